// One image of `animesion browse` at full size: the original beside the crop, zoom, provenance, and decisions by key.

/** Largest enlargement, largest one that fits a small image to the frame, and the step of one key. */
const MOST_ZOOM = 32;
const MOST_FIT = 6;
const ZOOM_STEP = 1.3;

/** Images that are read at once as a curator goes through a list. */
const READ_AHEAD = 60;

/** A dialog over the page, which is inert meanwhile; `close` is called for Escape. */
function Modal({ label, name, close, typed, children }) {
  const dialog = useRef();
  useLayoutEffect(() => {
    const shown = dialog.current;
    shown.showModal();
    shown.focus();
    return () => shown.close(); // which gives the focus back
  }, []);
  return html`<dialog class=${name} aria-label=${label} tabindex="-1" ref=${dialog} onKeyDown=${typed} onCancel=${(event) => {
    event.preventDefault();
    close();
  }}>${children}</dialog>`;
}

/** An image in a frame: wheel, pinch, double click and the commands in `commands.current[name]` zoom it, dragging moves it. */
function Pane({ name, title, source, boxes, crop, decided, commands, touched }) {
  const stage = useRef();
  const pointers = useRef(new Map());
  const [natural, setNatural] = useState(null);
  const [failed, setFailed] = useState(false);
  const [view, setView] = useState({ scale: 1, x: 0, y: 0, fitted: true });
  const size = () => [stage.current.clientWidth, stage.current.clientHeight];
  const fit = () => {
    if (!natural) return;
    const [width, height] = size();
    const scale = Math.min(width / natural[0], height / natural[1], MOST_FIT);
    setView({ scale, x: (width - scale * natural[0]) / 2, y: (height - scale * natural[1]) / 2, fitted: true });
  };
  /** The view moved so that the image stays in the frame, centred where it is smaller. */
  const held = ({ scale, x, y }) => {
    const within = (at, frame, image) => (image <= frame ? (frame - image) / 2 : Math.min(0, Math.max(frame - image, at)));
    const [width, height] = size();
    return { scale, x: within(x, width, scale * natural[0]), y: within(y, height, scale * natural[1]), fitted: false };
  };
  const zoom = (factor, at) => natural && setView((now) => {
    const [width, height] = size();
    const [px, py] = at || [width / 2, height / 2];
    const least = Math.min(width / natural[0], height / natural[1], 1) / 2;
    const scale = Math.min(MOST_ZOOM, Math.max(least, now.scale * factor));
    const by = scale / now.scale;
    return held({ scale, x: px - by * (px - now.x), y: py - by * (py - now.y) });
  });
  const whole = (at) => natural && setView((now) => {
    const [width, height] = size();
    const [px, py] = at || [width / 2, height / 2];
    return held({ scale: 1, x: px - (px - now.x) / now.scale, y: py - (py - now.y) / now.scale });
  });
  const move = (dx, dy) => natural && setView((now) => held({ ...now, x: now.x + dx, y: now.y + dy }));
  commands.current[name] = { zoom, fit, whole, move };
  useLayoutEffect(() => {
    fit();
    const watcher = new ResizeObserver(() => setView((now) => {
      if (now.fitted) fit();
      return now;
    }));
    watcher.observe(stage.current);
    return () => watcher.disconnect();
  }, [natural]);
  useLayoutEffect(() => () => {
    delete commands.current[name];
  }, []);
  const place = (event) => {
    const frame = stage.current.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  const wheel = useRef();
  wheel.current = (event) => {
    event.preventDefault();
    touched(name);
    zoom(Math.exp(-0.0016 * Math.max(-240, Math.min(240, event.deltaY))), place(event));
  };
  useEffect(() => {
    // the browser scrolls the page unless the listener says that it is not passive
    const listener = (event) => wheel.current(event);
    stage.current.addEventListener('wheel', listener, { passive: false });
    return () => stage.current && stage.current.removeEventListener('wheel', listener);
  }, []);
  const began = (event) => {
    if (event.button) return;
    touched(name);
    event.currentTarget.setPointerCapture(event.pointerId);
    pointers.current.set(event.pointerId, place(event));
  };
  const moved = (event) => {
    const known = pointers.current;
    const before = known.get(event.pointerId);
    if (!before) return;
    const now = place(event);
    const other = [...known].find(([id]) => id !== event.pointerId);
    if (other) {
      const [, [x, y]] = other;
      const apart = (at) => Math.max(1, Math.hypot(at[0] - x, at[1] - y));
      zoom(apart(now) / apart(before), [(now[0] + x) / 2, (now[1] + y) / 2]);
    } else move(now[0] - before[0], now[1] - before[1]);
    known.set(event.pointerId, now);
  };
  const ended = (event) => pointers.current.delete(event.pointerId);
  const loaded = (event) => setNatural([event.target.naturalWidth, event.target.naturalHeight]);
  const edges = crop && [0, 1, 2, 3].map((i) => inside(crop[i]));
  return html`<figure class="pane">
    <figcaption><strong>${title}</strong> ${natural ? html`<span class="quiet">${natural[0]}×${natural[1]}, <output>${Math.round(100 * view.scale)}%</output></span>` : null}
      <span class="tools"><button aria-label=${`Zoom out: ${title}`} onClick=${() => zoom(1 / ZOOM_STEP)} title="−">−</button><button aria-label=${`Zoom in: ${title}`} onClick=${() => zoom(ZOOM_STEP)} title="+">+</button>
      <button onClick=${fit} title="0">Fit</button><button onClick=${() => whole()} title="1">100%</button></span></figcaption>
    <div class="stage-box" ref=${stage} onPointerDown=${began} onPointerMove=${moved} onPointerUp=${ended} onPointerCancel=${ended} onDblClick=${(event) => (view.fitted ? whole(place(event)) : fit())}>
      ${failed ? html`<p class="none">no image</p>` : html`<div class=${`sheet${view.scale >= 3 ? ' coarse' : ''}`} style=${{ transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})`, '--zoom': view.scale, ...(natural ? { width: `${natural[0]}px`, height: `${natural[1]}px` } : { visibility: 'hidden' }) }}>
        <img src=${source} alt=${title} draggable=${false} onLoad=${loaded} onError=${() => setFailed(true)} />
        ${edges ? html`<span class="cropped" style=${placed(edges)}></span>` : null}
        ${boxes.map((box) => html`<span class="found" style=${placed(box)}><i>${box[4].toFixed(2)}</i></span>`)}
        ${decided ? html`<span class="decided" style=${placed(decided)}></span>` : null}</div>`}
    </div></figure>`;
}

const KEYS = [
  ['→ ←', 'next, previous'], ['x', 'exclude, and next'], ['k', 'keep, and next'], ['l', 'another label'], ['u', 'reset'], ['z Z', 'undo, redo'], ['+ −', 'zoom'], ['0 1', 'fit, 100%'],
  ['Shift + arrows', 'move'], ['b', 'boxes'], ['Space', 'select'], ['Esc', 'close'],
];

/** Where an image comes from; only addresses of http and https are links. */
const Provenance = ({ details }) => html`<dl class="facts">
  ${details.links.filter(([, address]) => /^https?:\/\//.test(address)).map(([name, address]) => html`<div><dt>${name}</dt><dd><a href=${address} target="_blank" rel="noopener noreferrer"><${Name} text=${address} /></a></dd></div>`)}
  ${details.facts.map(([name, text]) => html`<div><dt>${name}</dt><dd><${Name} text=${text} /></dd></div>`)}</dl>`;

function Viewer({ editor, store, decidable, resized }) {
  const { list } = editor.viewing;
  const [at, setAt] = useState(editor.viewing.at);
  const [label, setLabel] = useState('');
  const [boxed, setBoxed] = useState(true);
  const [active, setActive] = useState('');
  const pages = useRef(new Map());
  const commands = useRef({});
  const input = useRef();
  const item = async (i) => {
    const page = Math.floor(i / READ_AHEAD);
    if (!pages.current.has(page)) pages.current.set(page, list.load(page * READ_AHEAD, READ_AHEAD));
    const { items } = await pages.current.get(page);
    return items[i - page * READ_AHEAD];
  };
  const { value, error } = useLoaded(async () => {
    const found = await item(at);
    if (!found) throw new Error('the list has changed: close this view, and load the page again');
    if (at + 1 < list.total) item(at + 1).then((next) => { if (next) new Image().src = `api/sample/${encodeURIComponent(next.key)}`; }, () => {});
    return { at, details: await store.details(found.key) };
  }, [at]);
  const now = value && value.at === at ? value.details : null;
  const key = now ? now.key : '';
  const go = (to) => {
    if (to < 0 || to >= list.total) return editor.show(to < 0 ? 'This is the first image.' : 'This was the last image.');
    editor.show('');
    setLabel('');
    return setAt(to);
  };
  const decideThen = (what, text) => {
    if (!now || !editor.writable) return;
    editor.act(what, [key], text);
    if (at + 1 < list.total) setAt(at + 1);
    setLabel('');
  };
  const pane = () => commands.current[active] || commands.current.original || commands.current.sample;
  const typed = (event) => {
    event.stopPropagation();
    if (event.target.matches('input, select, textarea')) {
      if (event.key === 'Escape') {
        event.target.blur();
        event.preventDefault();
      }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] };
    const doing = {
      ArrowRight: () => go(at + 1), ArrowLeft: () => go(at - 1), Home: () => go(0), End: () => go(list.total - 1), PageDown: () => go(at + 1), PageUp: () => go(at - 1),
      x: () => decideThen('exclude'), k: () => decideThen('keep'), u: () => now && editor.writable && editor.act('forget', [key]), z: () => editor.writable && editor.undo(), Z: () => editor.writable && editor.redo(),
      l: () => input.current && input.current.focus(), b: () => setBoxed(!boxed),
      '+': () => pane() && pane().zoom(ZOOM_STEP), '=': () => pane() && pane().zoom(ZOOM_STEP), '-': () => pane() && pane().zoom(1 / ZOOM_STEP), 0: () => pane() && pane().fit(), 1: () => pane() && pane().whole(),
    };
    if (event.shiftKey && moves[event.key]) pane() && pane().move(...moves[event.key]);
    else if (event.key === ' ' && !event.target.matches('button, a, summary')) key && editor.select(key);
    else if (doing[event.key]) doing[event.key]();
    else return;
    event.preventDefault();
  };
  const decided = now && verdict(editor.decisions, key);
  // of an image that was neither cropped nor resized, the original is the same again
  const two = now && now.original && (now.crop || now.boxes.length || resized || decidable);
  const drawn = boxed && now ? now.boxes : [];
  const source = (of) => `api/${of}/${encodeURIComponent(key)}`;
  return html`<${Modal} name="viewer" label="Image at full size" close=${editor.close} typed=${typed}>
    <header><h2><${Name} text=${key || '…'} /></h2><span class="quiet">${thousands(at + 1)} of ${thousands(list.total)}</span>
      <button disabled=${at < 1} onClick=${() => go(at - 1)} title="←">Previous</button><button disabled=${at + 1 >= list.total} onClick=${() => go(at + 1)} title="→">Next</button>
      <button onClick=${editor.close} title="Esc">Close</button></header>
    ${error ? html`<p role="alert">${plain(error)}</p>` : null}
    <div class=${`panes${two ? ' two' : ''}`}>
      ${now && two ? html`<${Pane} key=${`original ${key}`} name="original" title="original" source=${source('original')} boxes=${drawn} crop=${boxed && now.crop} decided=${boxed && editor.decisions.box[key]} commands=${commands} touched=${setActive} />` : null}
      ${now && !now.kept && !now.original ? html`<p class="none">No image: ${plain(now.reason)}.</p>` : now ? html`<${Pane} key=${`sample ${key}`} name="sample" title=${now.kept ? 'in the dataset' : now.crop ? 'crop' : 'image'} source=${source('sample')} boxes=${[]} commands=${commands} touched=${setActive} />` : html`<p class="quiet">Loading…</p>`}
    </div>
    ${now ? html`<aside>
      <p class="state"><strong><${Name} text=${now.label || 'no label'} /></strong> ${now.kept ? html`<span class="good">kept: ${plain(now.split)}</span>` : html`<span class="bad"><${Name} text=${now.reason} /></span>`}
        ${decided ? html` <span class="tag decided"><${Name} text=${decided} /></span>` : null}${editor.selected.has(key) ? html` <span class="tag decided">selected</span>` : null}</p>
      ${now.detail ? html`<p class="quiet"><${Name} text=${now.detail} /></p>` : null}
      ${editor.writable ? html`<div class="choices"><button onClick=${() => decideThen('exclude')} title="x">Exclude</button><button onClick=${() => decideThen('keep')} title="k">Keep</button>
        <form onSubmit=${(event) => {
          event.preventDefault();
          if (!label.trim()) return;
          decideThen('label', label.trim());
          event.currentTarget.closest('dialog').focus(); // so that keys are for the list again
        }}><input ref=${input} list="labels" value=${label} maxlength="20000" onInput=${(event) => setLabel(event.target.value)} placeholder="correct label" aria-label="Correct label" title="l" /> <button disabled=${!label.trim()}>Label</button></form>
        ${decidable ? html`<button onClick=${() => editor.box(key)}>Box…</button>` : null}
        <button onClick=${() => editor.select(key)} aria-pressed=${editor.selected.has(key)}>${editor.selected.has(key) ? 'Deselect' : 'Select'}</button>
        <button onClick=${() => editor.act('forget', [key])} title="u">Reset</button><${Undo} editor=${editor} /></div>` : html`<p class="quiet">To make decisions, open the address that animesion browse printed, with its token.</p>`}
      <p role="status" class="quiet">${plain(editor.message)}</p>
      <${Provenance} details=${now} />
      ${now.original || !now.kept ? null : html`<p class="quiet">The file that the source gave is not in raw/, so only the image in the dataset is shown.</p>`}
      <details class="keys"><summary>Keys</summary><dl>${KEYS.map(([keys, meaning]) => html`<div><dt><kbd>${keys}</kbd></dt><dd>${meaning}</dd></div>`)}</dl></details>
    </aside>` : null}
  <//>`;
}
