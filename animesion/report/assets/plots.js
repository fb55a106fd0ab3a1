// Curves (uPlot, on a canvas) and histograms (SVG) in the colours of the theme.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A number that changes with the theme, so that canvases are redrawn. */
function useTheme() {
  const [count, set] = useState(0);
  useEffect(() => {
    const changed = () => set((n) => n + 1);
    const media = matchMedia('(prefers-color-scheme: dark)');
    media.addEventListener('change', changed);
    addEventListener('theme', changed);
    return () => {
      media.removeEventListener('change', changed);
      removeEventListener('theme', changed);
    };
  }, []);
  return count;
}

const isDark = () => {
  const { theme } = document.documentElement.dataset;
  return theme === 'dark' || (theme !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches);
};

/** Distances of ticks that are whole numbers. */
const WHOLE = [1, 2, 5].flatMap((n) => [...Array(13).keys()].map((i) => n * 10 ** i)).sort((a, b) => a - b);

/** The smallest of some numbers times a power of ten that is at least `n`. */
function roundUp(n, by) {
  const power = 10 ** Math.floor(Math.log10(n) + 1e-9);
  return power * (by.find((each) => each * power >= n * (1 - 1e-9)) || 10);
}

/** Colour of the class with a number: hues that follow one another are far apart. */
const hue = (number, dark) => `hsl(${(number * 137.508) % 360} ${dark ? '70% 65%' : '65% 42%'})`;

/** Round numbers from `low` to `high`, about `count` of them; on a logarithmic axis that spans enough, of powers of ten. */
function roundTicks(low, high, log, count, whole) {
  if (log && high / low >= 8) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) found.push(...[1, 2, 5].map((each) => [each, each * 10 ** power]));
    const inside = found.filter(([, tick]) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9));
    const tens = inside.filter(([each]) => each === 1);
    return (inside.length <= count + 1 || tens.length < 2 ? inside : tens).map(([, tick]) => tick);
  }
  const step = Math.max(roundUp((high - low) / count || 1, [1, 2, 5]), whole ? 1 : 0);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** A number of a unit as text: `bytes`, `share`, or none. */
const inUnit = (n, unit) => (unit === 'bytes' ? size(n).replace('.0 ', ' ') : unit === 'share' ? `${Number((100 * n).toPrecision(4))}%` : Math.abs(n) >= 1000 && Number.isInteger(n) ? thousands(n) : short(n));

/** Names and values of curves at a point; without one, at the last point of each. */
function Legend({ x, series, xLabel, at, unit }) {
  const last = (values) => values.reduce((found, value, i) => (value === null ? found : i), -1);
  const ends = series.map((each) => (at === null ? last(each.values) : at));
  const place = at === null ? Math.max(...ends) : at;
  if (place < 0 || (series.length < 2 && at === null)) return html`<ul class="legend"></ul>`;
  return html`<ul class="legend"><li class="quiet">${xLabel} ${thousands(x[place])}</li>${series.map((each, i) => {
    const value = each.values[ends[i]];
    return html`<li>${series.length > 1 ? html`<span class="swatch" style=${{ background: `var(--${each.tone || 'accent'})` }}></span>` : null}${plain(each.label)}${value === null || value === undefined ? null : html` <b>${inUnit(unit === 'share' ? Number(value.toPrecision(4)) : value, unit)}</b>`}</li>`;
  })}</ul>`;
}

/**
 * Curves over a common axis.
 *
 * `series` is a list of { label, values, tone, points }. `shade` draws behind them, `names` draws above the grid. `logX`
 * and `logY` make an axis logarithmic, `whole` is for an x axis of whole numbers, `unit` is the unit of y.
 */
function Curves({ x, series, xLabel, yLabel, logX, logY, whole, unit, shade, names, tall, range, label }) {
  const box = useRef();
  const theme = useTheme();
  const [at, setAt] = useState(null);
  const points = series.some((each) => each.points);
  useEffect(() => {
    const text = (log, kind) => (u, ticks) => ticks.map((t) => (t === null || (log && ![1, 2, 5].includes(+(t / 10 ** Math.floor(Math.log10(t) + 1e-9)).toFixed(6))) ? '' : inUnit(t, kind)));
    const axis = (name, log, kind) => ({
      label: name,
      labelSize: name ? 22 : 0,
      stroke: colour('soft'),
      font: '12px system-ui, sans-serif',
      labelFont: '12px system-ui, sans-serif',
      grid: { stroke: colour('line'), width: 1 },
      ticks: { show: false },
      values: text(log, kind),
    });
    const [least, most] = [x[0], x[x.length - 1]];
    const options = {
      width: box.current.clientWidth || 320,
      height: tall || 280,
      cursor: { drag: { x: true, y: false } },
      legend: { show: false },
      scales: {
        x: { time: false, distr: logX ? 3 : 1, ...(least === most ? { range: () => (logX ? [least / 2, least * 2] : [least - 1, least + 1]) } : {}) },
        y: { distr: logY ? 3 : 1, ...(range ? { range } : {}) },
      },
      axes: [{ ...axis(xLabel, logX), size: 34, ...(whole && !logX ? { incrs: WHOLE } : {}) }, { ...axis(yLabel, logY, unit), size: 54 }],
      series: [
        {},
        ...series.map((each) => ({
          stroke: colour(each.tone || 'accent'),
          width: each.points ? 0 : 2,
          paths: each.points ? () => null : undefined,
          points: { show: Boolean(each.points) || x.length < 40, size: each.points ? 6 : 5, ...(each.points ? { fill: colour(each.tone || 'accent') } : {}) },
          spanGaps: true,
        })),
      ],
      hooks: {
        ...(shade ? { drawClear: [shade] } : {}),
        ...(names ? { drawAxes: [names] } : {}),
        setCursor: [(u) => setAt(u.cursor.idx === undefined || u.cursor.left < 0 ? null : u.cursor.idx)],
      },
    };
    const plot = new uPlot(options, [x, ...series.map((each) => each.values)], box.current);
    const watcher = new ResizeObserver(() => plot.setSize({ width: box.current.clientWidth, height: options.height }));
    watcher.observe(box.current);
    return () => {
      watcher.disconnect();
      plot.destroy();
    };
  }, [x, series, theme]);
  return html`<div class="plot" ref=${box} role="img" aria-label=${label}></div>${points && at === null ? html`<p class="legend"></p>` : html`<${Legend} ...${{ x, series, xLabel, at, unit }} />`}`;
}

/** Stacked histogram of kept and dropped images; bin i is from edges[i] to edges[i + 1]. */
function Histogram({ title, log, whole, unit, edges, kept, dropped }) {
  const total = [...kept, ...dropped].reduce((sum, n) => sum + n, 0);
  const only = kept.length === 1;
  const [width, height] = [320, 96];
  const top = roundUp(Math.max(1, ...kept.map((n, i) => n + dropped[i])), [1, 2, 3, 4, 5, 6, 8]);
  const step = width / kept.length;
  const tall = (n) => (n ? Math.max(1, (n / top) * height) : 0);
  const [low, high] = [edges[0], edges[edges.length - 1]];
  const place = (tick) => 100 * (log ? Math.log(tick / low) / Math.log(high / low) : (tick - low) / (high - low));
  const bin = (i) => {
    const [from, to] = whole ? [Math.ceil(edges[i]), Math.floor(edges[i + 1])] : [edges[i], edges[i + 1]];
    return `${inUnit(from, unit)}${from === to ? '' : ` to ${inUnit(to, unit)}`}: ${thousands(kept[i])} kept, ${thousands(dropped[i])} dropped`;
  };
  if (only) return html`<figure class="histogram"><figcaption>${title}</figcaption><p class="only"><strong>${inUnit(whole ? Math.ceil(low) : low, unit)}</strong> for all ${thousands(total)} images</p></figure>`;
  const ticks = [];
  for (const tick of roundTicks(low, high, log, 5, whole)) {
    const [text, at] = [inUnit(tick, unit), place(tick)];
    // about the width of the text, in percent of a narrow histogram; at the ends it is moved inwards
    const width = 2.6 * text.length;
    const from = at < 5 ? at : at > 95 ? at - width : at - width / 2;
    if (!ticks.length || from > ticks[ticks.length - 1].to) ticks.push({ text, at, to: from + width + 1 });
  }
  return html`<figure class="histogram">
    <figcaption>${title}</figcaption>
    <p class="top">0 to ${amount(top, 'image')}</p>
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${`${title}: from ${inUnit(low, unit)} to ${inUnit(high, unit)}`}>
      ${kept.map((n, i) => html`<g>
        <title>${bin(i)}</title>
        <rect class="hit" x=${i * step} y="0" width=${step} height=${height} />
        <rect class="kept" x=${i * step + 0.5} y=${height - tall(n)} width=${Math.max(1, step - 1)} height=${tall(n)} />
        <rect class="dropped" x=${i * step + 0.5} y=${height - tall(n) - tall(dropped[i])} width=${Math.max(1, step - 1)} height=${tall(dropped[i])} />
      </g>`)}
    </svg>
    <div class="ticks" aria-hidden="true">${ticks.map(({ text, at }) => html`<span style=${{ left: `${at}%`, transform: `translateX(${at < 5 ? '0' : at > 95 ? '-100%' : '-50%'})` }}>${text}</span>`)}</div>
  </figure>`;
}
