// Decisions of a curator: what each action does to them, saving, undo, and the bar of actions on the selection.

/** The write token: from the address that `animesion browse` printed, then from the tab's session storage. */
function writeToken() {
  const given = /^#token=([\w-]+)$/.exec(location.hash);
  try {
    if (given) {
      sessionStorage.setItem('token', given[1]);
      history.replaceState(null, '', '#overview');
    }
    return sessionStorage.getItem('token') || '';
  } catch {
    return given ? given[1] : '';
  }
}

const without = (sets, gone) => sets.map((each) => each.filter((key) => !gone.has(key))).filter((each) => each.length > 1);

/**
 * The decisions after an action of the curator.
 *
 * `what` is exclude, keep, label, same, different or forget; `keys` are the images that it applies to. To keep an image
 * ends that it is excluded or shows several characters, and nothing else.
 */
function decide(before, what, keys, label) {
  const gone = new Set(keys);
  if (what === 'keep') return { ...before, exclude: before.exclude.filter((key) => !gone.has(key)), several: before.several.filter((key) => !gone.has(key)) };
  const now = {
    exclude: before.exclude.filter((key) => !gone.has(key)),
    label: Object.fromEntries(Object.entries(before.label).filter(([key]) => !gone.has(key))),
    same: before.same,
    different: before.different,
    pairs: before.pairs,
    box: before.box,
    several: before.several.filter((key) => !gone.has(key)),
  };
  const boxless = Object.fromEntries(Object.entries(before.box).filter(([key]) => !gone.has(key)));
  if (what === 'exclude' || what === 'forget') now.box = boxless;
  if (what === 'exclude') now.exclude = [...now.exclude, ...keys];
  if (what === 'label') Object.assign(now.label, Object.fromEntries(keys.map((key) => [key, label])));
  if (what === 'same' || what === 'different') {
    Object.assign(now, { exclude: before.exclude, label: before.label, several: before.several });
    const split = (each) => [each.filter((key) => gone.has(key)), each.filter((key) => !gone.has(key))];
    // the new decision wins; older sets keep what they state about their other images
    if (what === 'same') {
      now.different = before.different.flatMap((each) => {
        const [inside, outside] = split(each);
        return inside.length > 1 ? inside.map((key) => [...outside, key]) : [each];
      });
    } else {
      now.same = before.same.map((each) => (split(each)[0].length > 1 ? split(each)[1] : each));
    }
    now[what] = [...now[what], keys];
    for (const name of ['same', 'different']) now[name] = now[name].filter((each) => each.length > 1);
  }
  if (what === 'forget') Object.assign(now, { same: without(before.same, gone), different: without(before.different, gone) });
  return now;
}

/** Decisions as text that is equal if they are, whatever their order. */
function canonical(decisions) {
  const sets = (of) => [...new Set(of.map((each) => [...new Set(each)].sort().join(' ')))].sort();
  const pairs = decisions.pairs.map((each) => `${[...each.images].sort().join(' ')} ${each.verdict}`);
  return JSON.stringify([
    [...new Set(decisions.exclude)].sort(), [...new Set(decisions.several)].sort(), sets(decisions.same), sets(decisions.different), [...new Set(pairs)].sort(),
    Object.entries(decisions.label).sort(), Object.entries(decisions.box).sort(),
  ]);
}

/** How long a message is shown that is no error, in milliseconds. */
const MESSAGE_MS = 8000;

/** Most decisions that can be undone. */
const MOST_UNDONE = 200;

/**
 * The decisions, and what a curator does with them and with the selection; null in a page that nothing serves.
 *
 * Changes are saved one after another: each starts from what the one before saved. `undo` saves what was there before.
 */
function useDecisions(data) {
  const [state, set] = useState({ decisions: data.decisions, message: '', selected: new Set(), boxing: '', viewing: null, past: [], future: [] });
  const saved = useRef({ decisions: data.decisions, revision: data.revision, past: [], future: [], queue: Promise.resolve() });
  if (!data.live) return null;
  const show = (message) => set((now) => ({ ...now, message }));
  const put = async (decisions) => {
    show('Saving…');
    const answer = await fetch('api/decisions', {
      method: 'PUT',
      headers: { 'Content-Type': 'application/json', 'X-Animesion-Token': data.token },
      body: JSON.stringify({ decisions, revision: saved.current.revision }),
    });
    const text = await answer.text();
    if (!answer.ok) throw new Error(text || answer.statusText);
    return JSON.parse(text);
  };
  /** Save what `next` makes of the decisions; `keep` says what becomes of the lists of undone and redone ones. */
  const change = (next, keep, done, ends, unchanged = 'no decision changes') => {
    const now = saved.current;
    now.queue = now.queue.then(async () => {
      const before = now.decisions;
      const decisions = next(before, now);
      if (!decisions) return;
      try {
        if (canonical(decisions) === canonical(before)) show(`Nothing to save: ${unchanged}.`);
        else {
          const { revision, written } = await put(decisions);
          Object.assign(now, keep(before, now), { decisions, revision });
          set((old) => ({ ...old, decisions, past: now.past, future: now.future, message: written ? [done, `Saved to ${data.file}`].filter(Boolean).join(' ') : 'Nothing to save: the file has these decisions already.', ...(ends ? { selected: new Set(), boxing: '' } : {}) }));
        }
      } catch (error) {
        show(`Not saved: ${error.message}`);
      }
    });
    return now.queue;
  };
  const save = (next, unchanged) => change(next, (before, now) => ({ past: [...now.past, before].slice(-MOST_UNDONE), future: [] }), '', true, unchanged);
  return {
    ...state,
    writable: Boolean(data.token),
    /** What names the decisions as they are now, for `as_of`. */
    revision: () => saved.current.revision,
    show,
    select: (key) => set((now) => {
      const selected = new Set(now.selected);
      if (!selected.delete(key)) selected.add(key);
      return { ...now, selected };
    }),
    selectAll: (keys) => set((now) => ({ ...now, selected: new Set([...now.selected, ...keys]) })),
    clear: () => set((now) => ({ ...now, selected: new Set() })),
    act: (what, keys, label) => save((now) => decide(now, what, keys, label), what === 'keep' ? 'no decision excludes what is to be kept' : undefined),
    turn: (ids, verdict) => save((now) => turn(now, ids, verdict)),
    undo: () => change((_, { past }) => past[past.length - 1], (before, now) => ({ past: now.past.slice(0, -1), future: [...now.future, before] }), 'Undone.'),
    redo: () => change((_, { future }) => future[future.length - 1], (before, now) => ({ past: [...now.past, before], future: now.future.slice(0, -1) }), 'Done again.'),
    box: (key) => set((now) => ({ ...now, boxing: key })),
    decideBox: (key, box) => save((now) => decideBox(now, key, box)),
    decideSeveral: (keys) => save((now) => decideSeveral(now, keys)),
    /** Show an image at full size. `list` has `total` and `load(offset, limit)`; `at` is the image's position in it. */
    view: (list, at) => set((now) => ({ ...now, viewing: { list, at } })),
    close: () => set((now) => ({ ...now, viewing: null })),
    /** Save a filter under a name, or delete it; resolves to all filters, or to null where that failed. */
    saveFilter: async (name, address) => {
      try {
        const answer = await fetch('api/filters', {
          method: 'PUT',
          headers: { 'Content-Type': 'application/json', 'X-Animesion-Token': data.token },
          body: JSON.stringify({ name, address }),
        });
        const text = await answer.text();
        if (!answer.ok) throw new Error(text || answer.statusText);
        show(address === null ? 'Filter deleted.' : 'Filter saved.');
        return JSON.parse(text).filters;
      } catch (error) {
        show(`Not saved: ${error.message}`);
        return null;
      }
    },
  };
}

/** Number of decisions. */
function countDecisions(decisions) {
  const { exclude, label, same, different, pairs, box, several } = decisions;
  return exclude.length + Object.keys(label).length + same.length + different.length + pairs.length + Object.keys(box).length + several.length;
}

/** The decision about an image as a short label; empty for none. */
function verdict(decisions, key) {
  if (!decisions) return '';
  if (decisions.exclude.includes(key)) return 'excluded';
  if (decisions.several.includes(key)) return 'two characters';
  if (Object.hasOwn(decisions.box, key)) return 'box';
  if (Object.hasOwn(decisions.label, key)) return `→ ${decisions.label[key]}`;
  if (decisions.same.some((each) => each.includes(key))) return 'same';
  return decisions.different.some((each) => each.includes(key)) ? 'different' : '';
}

/** Buttons that take the last decision back, and that make it again. */
const Undo = ({ editor }) => (editor.writable ? html`<button disabled=${!editor.past.length} onClick=${editor.undo} title="z">Undo</button>
  ${editor.future.length ? html`<button onClick=${editor.redo} title="Z">Redo</button>` : null}` : null);

function Actions({ editor, decidable }) {
  const [label, setLabel] = useState('');
  const keys = [...editor.selected];
  const several = keys.length > 1;
  const typed = useCallback((event) => {
    if (event.target.matches('input, select, textarea') || event.ctrlKey || event.metaKey || event.altKey || editor.viewing || editor.boxing) return;
    if (editor.writable && event.key === 'z') editor.undo();
    else if (editor.writable && event.key === 'Z') editor.redo();
    if (!keys.length) return;
    const meant = { x: 'exclude', k: 'keep', s: several && 'same', d: several && 'different', u: 'forget' }[event.key];
    if (event.key === 'Escape') editor.clear();
    else if (meant && editor.writable) editor.act(meant, keys);
  }, [editor]);
  useLayoutEffect(() => {
    addEventListener('keydown', typed);
    return () => removeEventListener('keydown', typed);
  }, [typed]);
  useEffect(() => {
    if (!/^(Saved|Undone|Done|Nothing|Filter)/.test(editor.message)) return undefined;
    const waiting = setTimeout(() => editor.show(''), MESSAGE_MS);
    return () => clearTimeout(waiting);
  }, [editor.message, editor.past]);
  if (!keys.length) return editor.message ? html`<div class="actions"><span role="status">${plain(editor.message)}</span><${Undo} editor=${editor} /><button onClick=${() => editor.show('')}>Hide</button></div>` : null;
  if (!editor.writable) return html`<div class="actions" role="status">To make decisions, open the address that animesion browse printed, with its token.</div>`;
  return html`<div class="actions" role="toolbar" aria-label="Decisions about the selected images">
    <strong>${thousands(keys.length)} selected</strong>
    <button onClick=${() => editor.act('exclude', keys)} title="x">Exclude</button>
    <button onClick=${() => editor.act('keep', keys)} title="k">Keep</button>
    <form onSubmit=${(event) => {
      event.preventDefault();
      if (label.trim()) editor.act('label', keys, label.trim());
    }}><input list="labels" value=${label} maxlength="20000" onInput=${(event) => setLabel(event.target.value)} placeholder="correct label" aria-label="Correct label" />
    <button disabled=${!label.trim()}>Label</button></form>
    <button disabled=${!several} onClick=${() => editor.act('same', keys)} title="s">Same image</button>
    <button disabled=${!several} onClick=${() => editor.act('different', keys)} title="d">Different</button>
    ${decidable ? html`<button disabled=${several} onClick=${() => editor.box(keys[0])}>Box…</button>
    <button onClick=${() => editor.decideSeveral(keys)}>Two characters</button>` : null}
    <button onClick=${() => editor.act('forget', keys)} title="u">Reset</button>
    <button onClick=${editor.clear} title="Esc">Deselect</button>
    <${Undo} editor=${editor} />
    <span role="status">${plain(editor.message)}</span>
  </div>`;
}
