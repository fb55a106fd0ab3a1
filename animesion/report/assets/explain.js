// Views of `animesion explain`: images with maps, wrong predictions, a map of embeddings, classes, layers.

const picture = (data, i) => (i >= 0 ? `data:image/webp;base64,${data.images[i]}` : '');

/** An image with a caption below it; `size` is its longest side on the screen. */
function Picture({ data, image, size, children, alt }) {
  return html`<figure class="picture" style=${{ '--size': `${size}px` }}>
    ${image >= 0 ? html`<img src=${picture(data, image)} alt=${plain(alt || '')} loading="lazy" />` : html`<div class="none">no image</div>`}
    <figcaption>${children}</figcaption></figure>`;
}

const Guesses = ({ guesses, label }) => html`<table class="guesses"><tbody>${guesses.map(([name, p]) => html`<tr class=${label && name === label ? 'good' : ''}>
  <td class="n">${percent(p)}</td><td class="meter"><span style=${{ width: `${100 * p}%` }}></span></td><th scope="row"><${Name} text=${name} /></th></tr>`)}</tbody></table>`;

/** An image, what the network looks at, its guesses, and the training images that are most similar to it. */
function Explanation({ data, item }) {
  if (item.problem) return html`<li class="explained"><h3><${Name} text=${item.name} /></h3><p class="bad">not explained: ${plain(item.problem)}</p></li>`;
  return html`<li class="explained"><h3><${Name} text=${item.name} /></h3>
    ${item.label ? html`<p class="quiet">labelled <${Name} text=${item.label} /></p>` : null}
    <div class="panels">${item.panels.map(([title, image], i) => html`<${Picture} data=${data} image=${image} size=${128} alt=${i ? title : item.name}>${title}${i && item.target ? html`: <${Name} text=${item.target} />` : null}<//>`)}
      <${Guesses} guesses=${item.guesses} label=${item.label} /></div>
    ${item.neighbours.length ? html`<div class="nearest"><h4>Most similar training images</h4><div class="panels">${item.neighbours.map((each) => html`<${Picture} data=${data} image=${each.image} size=${84} alt=${each.key}>
      <span class=${each.label === (item.label || item.guesses[0][0]) ? 'good' : 'bad'}><${Name} text=${each.label} /></span> <span class="quiet">${each.similarity.toFixed(2)}</span><//>`)}</div></div>` : null}</li>`;
}

const ExplainedImages = ({ data }) => html`<p class="quiet">${plain(data.method)}. Colours are from the least to the most of an image.</p>
  <ul class="explanations">${data.rows.map((item) => html`<${Explanation} key=${item.name} data=${data} item=${item} />`)}</ul>`;

/** Wrong predictions by pair of classes; the most confident ones with maps and training images. */
function WrongPairs({ data }) {
  const [by, setBy] = useState('images');
  const found = data.mistakes;
  const groups = useMemo(() => {
    const best = (group) => group.items[0].guesses[0][1];
    return by === 'images' ? found.groups : [...found.groups].sort((a, b) => best(b) - best(a));
  }, [by]);
  if (!found.groups.length) return html`<p>All ${thousands(found.images)} images are predicted as labelled.</p>`;
  return html`<p>${thousands(found.wrong)} of ${thousands(found.images)} images (${percent(found.wrong / found.images)}) are predicted as another class than their label.
      ${found.shown < found.wrong ? ` The ${thousands(found.shown)} most confident are here.` : ''}</p>
    <div class="choices" role="group" aria-label="Order of the pairs">Order by ${[['images', 'number of images'], ['confidence', 'confidence']].map(([name, text]) => html`<button aria-pressed=${by === name} onClick=${() => setBy(name)}>${text}</button>`)}</div>
    <p class="quiet">${plain(data.method)}.</p>
    ${groups.map((group) => html`<section class="pairgroup" key=${`${group.label} ${group.guess}`}><h2><${Name} text=${group.label} /> <span class="quiet">predicted as</span> <${Name} text=${group.guess} /> <span class="quiet">${thousands(group.count)}</span></h2>
      <ul class="explanations">${group.items.map((item) => html`<${Explanation} key=${item.name} data=${data} item=${item} />`)}</ul>
      ${group.more ? html`<p class="quiet">${thousands(group.more)} less confident</p>` : null}</section>`)}`;
}

// -- embeddings ----------------------------------------------------------------------------------------------------


function PointMap({ data }) {
  const map = data.map;
  const box = useRef();
  const canvas = useRef();
  const view = useRef({ x: 0, y: 0, scale: 1 });
  const touches = useRef(new Map());
  const theme = useTheme();
  const [by, setBy] = useState('class');
  const [only, setOnly] = useState(-1);
  const [query, setQuery] = useState('');
  const [at, setAt] = useState(-1);
  const [place, setPlace] = useState([0, 0]);
  const count = map.x.length;
  const ways = [['class', 'class', map.classes, map.label], ['split', 'split', map.splits, map.split], ['correct', 'right or wrong', ['right', 'wrong'], map.label.map((label, i) => (map.guess[i] === label ? 0 : 1))]];
  const [, , names, ids] = ways.find(([name]) => name === by);
  const counts = useMemo(() => {
    const found = new Array(names.length).fill(0);
    for (const id of ids) found[id] += 1;
    return found;
  }, [by]);
  const dark = isDark();
  const tint = (id) => (by === 'correct' ? colour(id ? 'bad' : 'good') : hue(id, dark));

  // from the plane, -1 to 1, to pixels of the canvas on the screen
  const frame = () => {
    const { clientWidth: width, clientHeight: height } = canvas.current;
    return { width, height, unit: (Math.min(width, height) / 2.1) * view.current.scale };
  };
  const shown = (i, f) => [f.width / 2 + (map.x[i] / map.unit - view.current.x) * f.unit, f.height / 2 + (map.y[i] / map.unit - view.current.y) * f.unit];

  const draw = useCallback(() => {
    const element = canvas.current;
    if (!element) return;
    const f = frame();
    const ratio = devicePixelRatio || 1;
    if (element.width !== Math.round(f.width * ratio) || element.height !== Math.round(f.height * ratio)) {
      element.width = Math.round(f.width * ratio);
      element.height = Math.round(f.height * ratio);
    }
    const pen = element.getContext('2d');
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, f.width, f.height);
    const size = Math.max(2, Math.min(7, (count > 4000 ? 2.6 : 4.5) * Math.sqrt(view.current.scale)));
    const groups = new Map();
    for (let i = 0; i < count; i += 1) {
      const id = only < 0 || ids[i] === only ? ids[i] : -1;
      if (!groups.has(id)) groups.set(id, []);
      groups.get(id).push(i);
    }
    for (const id of [...groups.keys()].sort((a, b) => a - b)) {
      pen.fillStyle = id < 0 ? colour('line') : tint(id);
      for (const i of groups.get(id)) {
        const [x, y] = shown(i, f);
        if (x > -size && y > -size && x < f.width + size && y < f.height + size) pen.fillRect(x - size / 2, y - size / 2, size, size);
      }
    }
  }, [by, only, theme]);

  useEffect(() => {
    draw();
    const watcher = new ResizeObserver(draw);
    watcher.observe(canvas.current);
    return () => watcher.disconnect();
  }, [draw]);

  const zoom = (factor, px, py) => {
    const f = frame();
    const next = Math.min(200, Math.max(0.5, view.current.scale * factor));
    const unit = (f.unit / view.current.scale) * next;
    const [dx, dy] = [px - f.width / 2, py - f.height / 2];
    view.current = { x: view.current.x + dx / f.unit - dx / unit, y: view.current.y + dy / f.unit - dy / unit, scale: next };
    draw();
  };
  const middle = () => [frame().width / 2, frame().height / 2];
  const reset = () => {
    view.current = { x: 0, y: 0, scale: 1 };
    draw();
  };
  const pan = (dx, dy) => {
    const f = frame();
    view.current = { ...view.current, x: view.current.x - dx / f.unit, y: view.current.y - dy / f.unit };
    draw();
  };
  const point = (event) => {
    const edge = canvas.current.getBoundingClientRect();
    return [event.clientX - edge.left, event.clientY - edge.top];
  };
  const look = (px, py) => {
    const f = frame();
    let [best, nearest] = [-1, 144];
    for (let i = 0; i < count; i += 1) {
      if (only >= 0 && ids[i] !== only) continue;
      const [x, y] = shown(i, f);
      const distance = (x - px) ** 2 + (y - py) ** 2;
      if (distance < nearest) [best, nearest] = [i, distance];
    }
    if (best !== at) setAt(best);
    if (best >= 0) setPlace(shown(best, f));
  };
  const moved = (event) => {
    const now = point(event);
    const before = touches.current.get(event.pointerId);
    if (!before) {
      look(...now);
      return;
    }
    if (touches.current.size === 2) {
      const [other] = [...touches.current].filter(([id]) => id !== event.pointerId).map(([, where]) => where);
      const apart = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]) || 1;
      zoom(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else {
      pan(now[0] - before[0], now[1] - before[1]);
      if (at >= 0) setAt(-1);
    }
    touches.current.set(event.pointerId, now);
  };
  useEffect(() => {
    const turned = (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * 0.0015), ...point(event));
    };
    const element = canvas.current;
    element.addEventListener('wheel', turned, { passive: false });
    return () => element.removeEventListener('wheel', turned);
  }, [draw]);
  const typed = (event) => {
    const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (event.key in steps) pan(...steps[event.key]);
    else if (event.key === '+' || event.key === '=') zoom(1.4, ...middle());
    else if (event.key === '-') zoom(1 / 1.4, ...middle());
    else if (event.key === '0') reset();
    else return;
    event.preventDefault();
  };
  const wanted = query.normalize('NFKC').toLowerCase().trim();
  const listed = names.map((name, id) => [name, id]).filter(([name, id]) => counts[id] && (!wanted || name.normalize('NFKC').toLowerCase().includes(wanted))).sort((a, b) => counts[b[1]] - counts[a[1]]);
  const edge = canvas.current ? canvas.current.clientWidth : 0;
  return html`<p class="quiet">${thousands(count)} images, near each other if their embeddings are similar (${plain(map.method)}). Distances between groups mean little. Scroll or pinch to zoom, drag to move.</p>
    <div class="choices" role="group" aria-label="Colours">Colour by ${ways.filter(([name, , values]) => name !== 'split' || values.length > 1).map(([name, text]) => html`<button aria-pressed=${by === name} onClick=${() => { setBy(name); setOnly(-1); }}>${text}</button>`)}
      <span class="zoom"><button aria-label="Zoom in" onClick=${() => zoom(1.4, ...middle())}>+</button><button aria-label="Zoom out" onClick=${() => zoom(1 / 1.4, ...middle())}>−</button><button onClick=${reset}>Reset</button></span></div>
    <div class="pointmap"><div class="canvas" ref=${box}>
      <canvas ref=${canvas} tabindex="0" role="img" aria-label=${`Map of ${count} images`} onKeyDown=${typed}
        onPointerDown=${(event) => { canvas.current.setPointerCapture(event.pointerId); touches.current.set(event.pointerId, point(event)); look(...point(event)); }}
        onPointerMove=${moved} onPointerUp=${(event) => touches.current.delete(event.pointerId)} onPointerCancel=${(event) => touches.current.delete(event.pointerId)} onPointerLeave=${() => setAt(-1)} />
      ${at >= 0 ? html`<div class="marker" style=${{ left: `${place[0]}px`, top: `${place[1]}px` }}></div>
      <div class="tip" style=${{ left: `${Math.min(Math.max(0, place[0] + 14), Math.max(0, edge - 190))}px`, top: `${place[1] + 14}px` }}>
        <img src=${picture(data, map.image[at])} alt="" /><${Name} text=${map.keys[at]} /><${Name} text=${map.classes[map.label[at]]} />
        ${map.guess[at] !== map.label[at] ? html`<span class="bad">predicted as <${Name} text=${map.classes[map.guess[at]]} /></span>` : null}<span class="quiet">${plain(map.splits[map.split[at]])}</span></div>` : null}</div>
    <div class="legend"><label class="search">Search <input type="search" value=${query} onInput=${(event) => setQuery(event.target.value)} /></label>
      <ul>${listed.slice(0, 300).map(([name, id]) => html`<li><button aria-pressed=${only === id} onClick=${() => setOnly(only === id ? -1 : id)}><span class="dot" style=${{ background: tint(id) }}></span> <${Name} text=${name} /> <span class="quiet">${thousands(counts[id])}</span></button></li>`)}</ul>
      ${listed.length > 300 ? html`<p class="quiet">${thousands(listed.length - 300)} more: search for them</p>` : null}</div></div>`;
}

// -- classes and layers --------------------------------------------------------------------------------------------

/** A table of shares or similarities, coloured from `low` to `high`. */
const Heat = ({ rows, columns, values, low, high, title, corner }) => html`<div class="wide"><table class="matrix heat"><thead><tr><th scope="col">${corner}</th>${columns.map((name) => html`<th scope="col"><span><${Name} text=${name} /></span></th>`)}</tr></thead>
  <tbody>${rows.map((name, i) => html`<tr><th scope="row"><${Name} text=${name} /></th>${columns.map((other, j) => {
    const value = values[i][j];
    const share = value === null ? 0 : Math.max(0, Math.min(1, (value - low) / (high - low || 1)));
    return html`<td class="own" style=${{ '--share': share * 1.6 }} title=${value === null ? '' : title(i, j, value)}>${value === null ? '–' : Math.round(100 * value) || ''}</td>`;
  })}</tr>`)}</tbody></table></div>`;

function ClassPairs({ data }) {
  const found = data.classes;
  const ways = [...(found.cosines.length ? [['cosines', 'mean embeddings']] : []), ['confusion', 'confusions']];
  const [by, setBy] = useState(ways[0][0]);
  const values = found[by];
  const off = values.flatMap((row, i) => row.filter((_, j) => i !== j));
  const low = by === 'cosines' ? Math.min(...off, 1) : 0;
  const say = (i, j, value) => (by === 'cosines' ? `${plain(found.names[i])} and ${plain(found.names[j])}: cosine ${value.toFixed(3)}` : `${percent(value)} of ${plain(found.names[i])} predicted as ${plain(found.names[j])}`);
  return html`<div class="choices" role="group" aria-label="Similarity">Similarity by ${ways.map(([name, text]) => html`<button aria-pressed=${by === name} onClick=${() => setBy(name)}>${text}</button>`)}</div>
    <p class="quiet">${by === 'cosines' ? 'Cosine of the mean embeddings of two classes, times 100.' : 'Share of the images of a row that are predicted as the class of a column, in percent.'} Similar classes are next to each other.${found.names.length < found.total ? ` The ${found.names.length} classes of ${thousands(found.total)} that are in the most similar pairs.` : ''}</p>
    <${Heat} rows=${found.names} columns=${found.names} values=${values} low=${low} high=${1} title=${say} corner="class" />
    <h2>Most similar pairs</h2><div class="wide"><table><thead><tr><th scope="col">class</th><th scope="col">class</th>${found.cosines.length ? html`<th scope="col" class="n">cosine</th>` : null}<th scope="col" class="n">confused</th></tr></thead>
    <tbody>${found.pairs.map(([one, other, confused, cosine]) => html`<tr><td><${Name} text=${one} /></td><td><${Name} text=${other} /></td>${found.cosines.length ? html`<td class="n">${cosine.toFixed(3)}</td>` : null}<td class="n">${percent(confused)}</td></tr>`)}</tbody></table></div>
    <p class="quiet">Confused: share of the images of both classes that are predicted as the other one.</p>`;
}

/** Mean attention distance of each head by block: a dot per head. */
function Distances({ found }) {
  const [width, height, left, bottom] = [640, 300, 48, 40];
  const most = found.pixels;
  const x = (i) => left + ((i + 0.5) / found.values.length) * (width - left - 10);
  const y = (v) => height - bottom - (v / most) * (height - bottom - 10);
  const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(share * most));
  const every = Math.ceil(found.values.length / 16);
  return html`<section><h2>Mean attention distance</h2><p class="quiet">How far the patches that a head attends to are from the patch that attends, weighted by attention; a dot per head, over ${thousands(found.images)} images of ${found.pixels} px. Heads of the first blocks that look at their surroundings are near 0.</p>
    <svg class="distances" viewBox=${`0 0 ${width} ${height}`} role="img" aria-label="Mean attention distance by block">
      ${marks.map((mark) => html`<g><line x1=${left} x2=${width} y1=${y(mark)} y2=${y(mark)} class="gridline" /><text x=${left - 6} y=${y(mark) + 4} text-anchor="end">${mark}</text></g>`)}
      ${found.values.map((heads, i) => html`<g>${heads.map((value, head) => html`<circle cx=${x(i)} cy=${y(value)} r="4"><title>${`block ${i}, head ${head}: ${value.toFixed(1)} px`}</title></circle>`)}${i % every ? null : html`<text x=${x(i)} y=${height - bottom + 16} text-anchor="middle">${i}</text>`}</g>`)}
      <text x=${(width + left) / 2} y=${height - 4} text-anchor="middle">block</text><text x="12" y=${height / 2} text-anchor="middle" transform=${`rotate(-90 12 ${height / 2})`}>pixels</text></svg></section>`;
}

function Layers({ data }) {
  const found = data.layers;
  return html`${found.cka ? html`<section><h2>Similarity of layers (CKA)</h2>
      <p class="quiet">Linear CKA of the mean features of each layer of <${Name} text=${found.cka.one} /> (rows) and of <${Name} text=${found.cka.other} /> (columns), times 100, on ${thousands(found.cka.images)} images. 100: the same up to rotation and scale.</p>
      <${Heat} rows=${found.cka.rows} columns=${found.cka.columns} values=${found.cka.values} low=${0} high=${1} title=${(i, j, value) => `${plain(found.cka.rows[i])} and ${plain(found.cka.columns[j])}: ${value.toFixed(3)}`} corner="layer" /></section>` : null}
    ${found.distance ? html`<${Distances} found=${found.distance} />` : null}`;
}

const explainTabs = (data) => [
  ...(data.rows.length ? [['images', 'Images']] : []), ...(data.mistakes ? [['mistakes', 'Mistakes']] : []), ...(data.map ? [['map', 'Map']] : []),
  ...(data.classes ? [['similar', 'Classes']] : []), ...(data.layers ? [['layers', 'Layers']] : []),
];

function Explain({ data, at }) {
  const views = { images: ExplainedImages, mistakes: WrongPairs, map: PointMap, similar: ClassPairs, layers: Layers };
  const View = views[at[0]];
  return html`<div class="explain"><p class="quiet"><${Name} text=${data.network} />${data.about ? html`, <${Name} text=${data.about} />` : null}</p>${View ? html`<${View} key=${at[0]} data=${data} />` : html`<p>Nothing to show.</p>`}</div>`;
}
