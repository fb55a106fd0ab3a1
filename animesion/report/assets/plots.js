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

/**
 * Curves over a common axis.
 *
 * `series` is a list of { label, values, tone, points }. `shade` draws behind them, `names` draws above the grid. `logX`
 * and `logY` make an axis logarithmic.
 */
function Curves({ x, series, xLabel, yLabel, logX, logY, shade, names, tall, range, label }) {
  const box = useRef();
  const theme = useTheme();
  useEffect(() => {
    const axis = (text, log) => ({
      label: text,
      labelSize: 22,
      stroke: colour('soft'),
      font: '12px system-ui, sans-serif',
      labelFont: '12px system-ui, sans-serif',
      grid: { stroke: colour('line'), width: 1 },
      ticks: { show: false },
      size: 46,
      values: log ? (u, ticks) => ticks.map((t) => (t !== null && [1, 2, 5].includes(+(t / 10 ** Math.floor(Math.log10(t) + 1e-9)).toFixed(6)) ? thousands(t) : '')) : (u, ticks) => ticks.map((t) => short(t)),
    });
    const options = {
      width: box.current.clientWidth || 320,
      height: tall || 280,
      cursor: { drag: { x: true, y: false } },
      legend: { live: true },
      scales: {
        x: { time: false, distr: logX ? 3 : 1 },
        y: { distr: logY ? 3 : 1, ...(range ? { range } : {}) },
      },
      axes: [axis(xLabel, logX), axis(yLabel, logY)],
      series: [
        { label: xLabel, value: (u, v) => (v === null ? '' : thousands(v)) },
        ...series.map((each) => ({
          label: each.label,
          stroke: colour(each.tone || 'accent'),
          width: each.points ? 0 : 2,
          paths: each.points ? () => null : undefined,
          points: { show: Boolean(each.points) || x.length < 40, size: each.points ? 6 : 5, ...(each.points ? { fill: colour(each.tone || 'accent') } : {}) },
          spanGaps: true,
          value: (u, v) => (v === null || v === undefined ? '' : short(v)),
        })),
      ],
      hooks: { ...(shade ? { drawClear: [shade] } : {}), ...(names ? { drawAxes: [names] } : {}) },
    };
    const plot = new uPlot(options, [x, ...series.map((each) => each.values)], box.current);
    const watcher = new ResizeObserver(() => plot.setSize({ width: box.current.clientWidth, height: options.height }));
    watcher.observe(box.current);
    return () => {
      watcher.disconnect();
      plot.destroy();
    };
  }, [x, series, theme]);
  return html`<div class="plot" ref=${box} role="img" aria-label=${label}></div>`;
}

/** Stacked histogram of kept and dropped images; bin i is from edges[i] to edges[i + 1]. */
function Histogram({ title, edges, kept, dropped }) {
  const [width, height] = [320, 96];
  const most = Math.max(1, ...kept.map((n, i) => n + dropped[i]));
  const step = width / kept.length;
  const tall = (n) => (n ? Math.max(1, (n / most) * height) : 0);
  return html`<figure class="histogram">
    <figcaption>${title}</figcaption>
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${`${title}: from ${short(edges[0])} to ${short(edges[edges.length - 1])}`}>
      ${kept.map((n, i) => html`<g>
        <title>${`${short(edges[i])} to ${short(edges[i + 1])}: ${thousands(n)} kept, ${thousands(dropped[i])} dropped`}</title>
        <rect class="hit" x=${i * step} y="0" width=${step} height=${height} />
        <rect class="kept" x=${i * step + 0.5} y=${height - tall(n)} width=${Math.max(1, step - 1)} height=${tall(n)} />
        <rect class="dropped" x=${i * step + 0.5} y=${height - tall(n) - tall(dropped[i])} width=${Math.max(1, step - 1)} height=${tall(dropped[i])} />
      </g>`)}
    </svg>
    <div class="ends"><span>${short(edges[0])}</span>${kept.length > 1 ? html`<span>${short(edges[Math.floor(edges.length / 2)])}</span><span>${short(edges[edges.length - 1])}</span>` : null}</div>
  </figure>`;
}
