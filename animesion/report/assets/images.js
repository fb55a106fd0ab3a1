// All images of a build that `animesion browse` serves: filters in the address, a map to draw an area on, and a grid.

const FILTERS = ['status', 'split', 'label', 'text', 'decided', 'area'];

/** The filter in the part of the address after `?`. */
function filterOf(query) {
  const given = new URLSearchParams(query);
  return Object.fromEntries(FILTERS.map((name) => [name, given.get(name) || '']));
}

/** The part of the address after `?` for a filter. */
const addressOf = (filter) => new URLSearchParams(FILTERS.filter((name) => filter[name]).map((name) => [name, filter[name]])).toString();

/** Least distance of two corners of a drawn area, as a share of the map, and most corners. */
const CORNER_GAP = 0.008;
const MOST_CORNERS = 200;

/** Longest way of the pointer that is a click and no area, in pixels. */
const CLICK = 5;

const corner = ([x, y]) => `${Number(x.toFixed(3))},${Number(y.toFixed(3))}`;
const cornersOf = (area) => (area ? area.split(' ').map((each) => each.split(',').map(Number)) : []);


/** The images that a filter accepts as points; drawing round some of them sets the area of the filter. */
function ImageMap({ value, area, setArea, open }) {
  const canvas = useRef();
  const theme = useTheme();
  const [size, setSize] = useState(null);
  const [drawn, setDrawn] = useState(null);
  const [cursor, setCursor] = useState(null);
  const [near, setNear] = useState(-1);
  useLayoutEffect(() => {
    const seen = () => {
      const width = canvas.current.parentElement.clientWidth;
      setSize([width, Math.round(Math.min(460, Math.max(240, 0.8 * width)))]);
    };
    seen();
    const watcher = new ResizeObserver(seen);
    watcher.observe(canvas.current.parentElement);
    return () => watcher.disconnect();
  }, []);
  useLayoutEffect(() => {
    if (!size) return;
    const [width, height] = size;
    const ratio = devicePixelRatio || 1;
    canvas.current.width = width * ratio;
    canvas.current.height = height * ratio;
    const pen = canvas.current.getContext('2d');
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    const dark = isDark();
    const radius = value.keys.length > 5000 ? 1.6 : value.keys.length > 800 ? 2.4 : 3.4;
    for (const kept of [0, 1]) {
      value.keys.forEach((_, i) => {
        if (value.kept[i] !== kept) return;
        pen.beginPath();
        pen.arc((value.x[i] / 1e4) * width, (value.y[i] / 1e4) * height, radius, 0, 2 * Math.PI);
        if (kept) {
          pen.fillStyle = hue(value.label[i], dark);
          pen.fill();
        } else {
          pen.strokeStyle = colour('soft');
          pen.stroke();
        }
      });
    }
    const shape = drawn || cornersOf(area);
    if (shape.length) {
      pen.beginPath();
      shape.forEach(([x, y], i) => (i ? pen.lineTo(x * width, y * height) : pen.moveTo(x * width, y * height)));
      if (!cursor) pen.closePath();
      pen.strokeStyle = colour('ink');
      pen.lineWidth = 1.5;
      pen.setLineDash([5, 4]);
      pen.stroke();
      pen.setLineDash([]);
    }
    if (cursor) {
      pen.strokeStyle = colour('accent');
      pen.lineWidth = 2;
      pen.beginPath();
      pen.moveTo(cursor[0] * width - 8, cursor[1] * height);
      pen.lineTo(cursor[0] * width + 8, cursor[1] * height);
      pen.moveTo(cursor[0] * width, cursor[1] * height - 8);
      pen.lineTo(cursor[0] * width, cursor[1] * height + 8);
      pen.stroke();
    }
    if (near >= 0 && near < value.keys.length) {
      pen.beginPath();
      pen.arc((value.x[near] / 1e4) * width, (value.y[near] / 1e4) * height, radius + 4, 0, 2 * Math.PI);
      pen.strokeStyle = colour('ink');
      pen.lineWidth = 2;
      pen.stroke();
    }
  }, [value, size, drawn, area, cursor, near, theme]);
  const place = (event) => {
    const frame = canvas.current.getBoundingClientRect();
    return [inside((event.clientX - frame.left) / frame.width), inside((event.clientY - frame.top) / frame.height)];
  };
  const nearest = ([x, y], within) => {
    let [best, found] = [within, -1];
    value.keys.forEach((_, i) => {
      const distance = Math.hypot((value.x[i] / 1e4 - x) * size[0], (value.y[i] / 1e4 - y) * size[1]);
      if (distance < best) [best, found] = [distance, i];
    });
    return found;
  };
  const close = (corners) => {
    setDrawn(null);
    setCursor(null);
    if (corners.length > 2) setArea(corners.map(corner).join(' '));
  };
  const far = ([x, y], [u, v]) => Math.hypot((x - u) * size[0], (y - v) * size[1]);
  const began = (event) => {
    if (event.button) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    setCursor(null);
    setDrawn([place(event)]);
  };
  const moved = (event) => {
    const at = place(event);
    setNear(nearest(at, 14));
    if (!drawn || cursor) return;
    const last = drawn[drawn.length - 1];
    if (drawn.length < MOST_CORNERS && Math.hypot(at[0] - last[0], at[1] - last[1]) > CORNER_GAP) setDrawn([...drawn, at]);
  };
  const ended = (event) => {
    if (!drawn || cursor) return;
    const at = place(event);
    if (drawn.every((each) => far(each, at) < CLICK)) {
      setDrawn(null);
      const found = nearest(at, 14);
      if (found >= 0) open(value.keys[found]);
    } else close(drawn);
  };
  const typed = (event) => {
    const step = event.shiftKey ? 0.1 : 0.02;
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (move) {
      const at = cursor || [0.5, 0.5];
      const next = cursor ? [inside(at[0] + move[0]), inside(at[1] + move[1])] : at;
      setCursor(next);
      setNear(nearest(next, 14));
      if (!cursor) setDrawn([]);
    } else if (event.key === ' ' && cursor) setDrawn([...(drawn || []), cursor]);
    else if (event.key === 'Enter' && cursor) {
      if (drawn && drawn.length > 2) close(drawn);
      else if (near >= 0) open(value.keys[near]);
    } else if (event.key === 'Escape' && (cursor || area)) {
      setDrawn(null);
      setCursor(null);
      if (!cursor) setArea('');
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return html`<div class="map">
    <canvas ref=${canvas} style=${size ? { width: `${size[0]}px`, height: `${size[1]}px` } : {}} tabindex="0" role="application"
      aria-label="Map of the images. Draw round images with the pointer; or move the cross with the arrow keys, set corners with Space, and close the area with Enter."
      onPointerDown=${began} onPointerMove=${moved} onPointerUp=${ended} onPointerCancel=${() => setDrawn(null)} onPointerLeave=${() => setNear(-1)} onKeyDown=${typed}></canvas>
    <p class="near" aria-live="polite">${near >= 0 && near < value.keys.length ? html`<img src=${`api/image/${encodeURIComponent(value.keys[near])}`} alt="" />
      <span><${Name} text=${value.labels[value.label[near]] || 'no label'} /><${Name} quiet text=${value.keys[near]} /></span>` : html`<span class="quiet">Draw round images to show only them. Point at one to see it, click to open it.</span>`}</p>
  </div>`;
}

/** What the points of a map are, in words. */
const MAP_KINDS = {
  embeddings: 'Images that look alike are near one another: the first two principal components of the embeddings of the build.',
  thumbnails: 'Images of like colours and shapes are near one another: the first two principal components of their 16 px thumbnails. A build with duplicates.embedding places them by what they show.',
};

function MapPanel({ store, filter, asOf, setArea, open }) {
  const { area, ...rest } = filter;
  const wanted = addressOf(rest);
  const { value, error } = useLoaded(() => store.map(filterOf(wanted), asOf), [wanted, asOf]);
  if (error) return html`<p role="alert">${plain(error)}</p>`;
  if (!value) return html`<p class="quiet">Loading the map…</p>`;
  if (!value.kind) return html`<p class="quiet">No map: the build has no features/.</p>`;
  return html`<${ImageMap} value=${value} area=${area} setArea=${setArea} open=${open} />
    <p class="quiet">${MAP_KINDS[value.kind]} Colours are classes; rings are dropped images.${value.keys.length < value.total ? ` ${thousands(value.keys.length)} of ${thousands(value.total)} are drawn; an area holds all.` : ''}</p>`;
}

function SavedFilters({ data, editor, address }) {
  const [filters, setFilters] = useState(data.filters);
  const [name, setName] = useState('');
  const names = Object.keys(filters).sort();
  const now = names.find((each) => addressOf(filterOf(filters[each])) === address) || '';
  const keep = async (of, what) => {
    const found = await editor.saveFilter(of, what);
    if (!found) return;
    data.filters = found;
    setFilters(found);
    setName('');
  };
  return html`<div class="saved">
    <label>Saved filters <select value=${now} onChange=${(event) => { if (event.target.value) location.hash = `#images?${addressOf(filterOf(filters[event.target.value]))}`; }}>
      <option value="">${names.length ? 'choose…' : 'none yet'}</option>${names.map((each) => html`<option value=${each}>${plain(each)}</option>`)}</select></label>
    ${editor.writable && now ? html`<button onClick=${() => keep(now, null)}>Delete</button>` : null}
    ${editor.writable && address && !now ? html`<form onSubmit=${(event) => {
      event.preventDefault();
      if (name.trim()) keep(name.trim(), address);
    }}><input value=${name} maxlength="100" onInput=${(event) => setName(event.target.value)} placeholder="name of this filter" aria-label="Name of this filter" /> <button disabled=${!name.trim()}>Save filter</button></form>` : null}
  </div>`;
}

function Images({ data, store, editor, query }) {
  const filter = useMemo(() => filterOf(query), [query]);
  const address = addressOf(filter);
  // decided images stay where they are until the filter is set again
  const [asOf, setAsOf] = useState(editor.revision());
  const [offset, go] = useState(0);
  const [text, setText] = useState(filter.text);
  const typing = useRef(0);
  useEffect(() => {
    go(0);
    setAsOf(editor.revision());
    setText(filter.text);
  }, [address]);
  const list = useMemo(() => ({ load: (from, limit) => store.images(filter, asOf, from, limit) }), [address, asOf]);
  const { value, error } = useLoaded(() => list.load(offset, PAGE), [list, offset]);
  const set = (change) => {
    const next = addressOf({ ...filter, ...change });
    location.hash = `#images${next ? `?${next}` : ''}`;
  };
  const search = (event) => {
    setText(event.target.value);
    clearTimeout(typing.current);
    typing.current = setTimeout(() => set({ text: event.target.value.trim() }), 250);
  };
  const reasons = data.drops.filter((each) => each.count);
  const pick = (name, of, options) => html`<label>${name} <select value=${filter[of]} onChange=${(event) => set({ [of]: event.target.value })}>${options}</select></label>`;
  const whole = value && { ...list, total: value.total };
  return html`<div class="all">
    <h2>Images</h2>
    <div class="filters" role="search">
      <label class="text">Search <input type="search" value=${text} maxlength="500" onInput=${search} placeholder="key, label or source id" /></label>
      ${pick('Show', 'status', html`<option value="">kept</option><option value="dropped">dropped</option><option value="all">all</option>${reasons.map((each) => html`<option value=${each.reason}>${plain(each.reason)} (${thousands(each.count)})</option>`)}`)}
      ${pick('Split', 'split', html`<option value="">all</option>${data.splits.map((each) => html`<option value=${each.name}>${plain(each.name)}</option>`)}`)}
      ${pick('Decided', 'decided', html`<option value="">all</option><option value="no">undecided</option><option value="yes">decided</option>`)}
      <label class="text">Class <input list="labels" value=${filter.label} onChange=${(event) => set({ label: event.target.value })} placeholder="all" /></label>
    </div>
    <${SavedFilters} data=${data} editor=${editor} address=${address} />
    <div class="mapped">
      <section class="mapside" aria-label="Map"><${MapPanel} store=${store} filter=${filter} asOf=${asOf} setArea=${(area) => set({ area })} open=${(key) => editor.view({ total: 1, load: () => Promise.resolve({ total: 1, items: [{ key }] }) }, 0)} /></section>
      <section class="gridside" aria-label="Images">
        ${error ? html`<p role="alert">${plain(error)}</p>` : null}
        ${value ? html`<p class="count"><strong role="status">${amount(value.total, 'image')}</strong>
            ${value.items.length ? html`<button onClick=${() => editor.selectAll(value.items.map((item) => item.key))}>Select this page</button>
            <button onClick=${() => editor.view(whole, offset)}>Full size</button>` : null}
            ${filter.area ? html`<button onClick=${() => set({ area: '' })}>Area of the map ×</button>` : null}
            ${address ? html`<button onClick=${() => { location.hash = '#images'; }}>Clear filters</button>` : null}
            ${filter.decided && asOf !== editor.revision() ? html`<button onClick=${() => setAsOf(editor.revision())}>Filter again</button>` : null}</p>
          <${Cards} items=${value.items.map(({ boxes, ...item }) => item)} store=${store} editor=${editor} list=${whole} offset=${offset} lines=${(item) => html`<${Key} item=${item} />${item.label ? html`<${Name} text=${item.label} />` : null}
            ${item.kept ? html`<span class="quiet">${item.split}</span>` : html`<span class="bad"><${Name} text=${item.reason} /></span>`}`} />
          <${Pager} offset=${offset} limit=${PAGE} total=${value.total} go=${(to) => { go(to); scrollTo(0, 0); }} />` : html`<p class="quiet">Loading…</p>`}
      </section>
    </div>
  </div>`;
}
