// Boxes over images, and the dialog in which a curator chooses or draws the box of the face.

const share = (value) => `${(100 * value).toFixed(3)}%`;
const inside = (value) => Math.min(1, Math.max(0, value));

/** Least side of a drawn box, as a share of the image: a click draws none. */
const LEAST_SIDE = 0.005;

const placed = ([left, top, right, bottom]) => ({ left: share(left), top: share(top), width: share(right - left), height: share(bottom - top) });

/** An image (the children) with the detector's boxes and their scores, and the box that was decided. */
const Boxed = ({ boxes, decided, children }) => html`<span class="boxed">${children}
  ${boxes.map((box) => html`<span class="found" style=${placed(box)}><i>${box[4].toFixed(2)}</i></span>`)}
  ${decided ? html`<span class="decided" style=${placed(decided)}></span>` : null}</span>`;

/** The decisions with a box of an image; other decisions on its face end, its label stays. */
function decideBox(before, key, box) {
  const boxes = Object.fromEntries(Object.entries(before.box).filter(([other]) => other !== key));
  if (box) boxes[key] = box.map((value) => Number(inside(value).toFixed(4)));
  return { ...before, box: boxes, several: before.several.filter((other) => other !== key), exclude: box ? before.exclude.filter((other) => other !== key) : before.exclude };
}

/** The decisions with images of several characters; other decisions on each of them end. */
function decideSeveral(before, keys) {
  const gone = new Set(keys);
  const rest = (of) => Object.fromEntries(Object.entries(of).filter(([key]) => !gone.has(key)));
  return {
    ...before,
    exclude: before.exclude.filter((key) => !gone.has(key)),
    label: rest(before.label),
    box: rest(before.box),
    several: [...before.several.filter((key) => !gone.has(key)), ...keys],
  };
}

function BoxDialog({ editor, store }) {
  const key = editor.boxing;
  const { value, error } = useLoaded(() => store.details(key), [key]);
  const [box, setBox] = useState(editor.decisions.box[key] || null);
  const [start, setStart] = useState(null);
  const stage = useRef();
  const place = (event) => {
    const frame = stage.current.getBoundingClientRect();
    return [inside((event.clientX - frame.left) / frame.width), inside((event.clientY - frame.top) / frame.height)];
  };
  const drawn = (to) => [Math.min(start[0], to[0]), Math.min(start[1], to[1]), Math.max(start[0], to[0]), Math.max(start[1], to[1])];
  const large = (each) => each[2] - each[0] >= LEAST_SIDE && each[3] - each[1] >= LEAST_SIDE;
  const began = (event) => {
    if (event.button) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    setStart(place(event));
    event.preventDefault();
  };
  const moved = (event) => {
    if (start && large(drawn(place(event)))) setBox(drawn(place(event)));
  };
  const ended = (event) => {
    if (!start) return;
    const [x, y] = place(event);
    if (large(drawn([x, y]))) setBox(drawn([x, y]));
    else if (value) {
      // a click: the smallest of the detector's boxes there
      const area = (each) => (each[2] - each[0]) * (each[3] - each[1]);
      const [hit] = value.boxes.filter((each) => each[0] <= x && x <= each[2] && each[1] <= y && y <= each[3]).sort((a, b) => area(a) - area(b));
      if (hit) setBox(hit.slice(0, 4));
    }
    setStart(null);
  };
  const edge = (name, at) => html`<label>${name} <input type="number" min="0" max="100" step="0.1" value=${box ? (100 * box[at]).toFixed(1) : ''} disabled=${!box}
    onChange=${(event) => setBox(box.map((old, i) => (i === at ? inside(Number(event.target.value) / 100) : old)))} /></label>`;
  const good = box && large(box);
  return html`<${Modal} name="boxing" label="Box of the face" close=${() => editor.box('')} typed=${(event) => event.stopPropagation()}>
    <h2><${Name} text=${key} /></h2>
    <p class="quiet">Click a box of the detector to choose it, or draw one with the pointer. The crop adds the recipe's margin.</p>
    ${error ? html`<p role="alert">${plain(error)}</p>` : null}
    <div class="stage" ref=${stage} onPointerDown=${began} onPointerMove=${moved} onPointerUp=${ended} onPointerCancel=${() => setStart(null)}>
      <${Boxed} boxes=${value ? value.boxes : []} decided=${box}><img src=${`api/original/${encodeURIComponent(key)}`} alt=${plain(key)} draggable=${false} /><//></div>
    <p class="choices">${value && value.boxes.length ? value.boxes.map((each, i) => html`<button aria-pressed=${Boolean(box) && each.slice(0, 4).join() === box.join()} onClick=${() => setBox(each.slice(0, 4))}>box ${i + 1}, score ${each[4].toFixed(2)}</button>`) : html`<span class="quiet">The detector found no box.</span>`}
      <button onClick=${() => setBox([0.25, 0.25, 0.75, 0.75])}>New box</button></p>
    <p class="choices">${['left %', 'top %', 'right %', 'bottom %'].map(edge)}</p>
    <p class="choices">
      <button disabled=${!good || !editor.writable} onClick=${() => editor.decideBox(key, box)}>Use this box</button>
      <button disabled=${!editor.writable} onClick=${() => editor.decideSeveral([key])}>Two characters</button>
      <button disabled=${!editor.writable || !(key in editor.decisions.box || editor.decisions.several.includes(key))} onClick=${() => editor.decideBox(key, null)}>Reset</button>
      <button onClick=${() => editor.box('')}>Close</button></p>
  <//>`;
}
