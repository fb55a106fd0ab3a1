// Shared by all views: elements, safe text, number formats, routing by the address after `#`, long lists.

const html = htm.bind(preact.h);
const { useState, useEffect, useLayoutEffect, useRef, useMemo, useCallback } = preactHooks;

/** Untrusted text: invisible characters and characters that change the text direction are written as [U+XXXX]. */
function plain(text) {
  return String(text).replace(
    /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\uffff]/g,
    (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0')}]`,
  );
}

/** An untrusted name, isolated from the text direction around it. */
const Name = ({ text, quiet }) => html`<bdi class=${quiet ? 'name quiet' : 'name'} title=${plain(text)}>${plain(text)}</bdi>`;

const thousands = (n) => (n === null || n === undefined ? '' : n.toLocaleString('en-US'));
/** A number with the noun that fits it. */
const amount = (n, one, several = `${one}s`) => `${thousands(n)} ${n === 1 ? one : several}`;
const percent = (share, digits = 1) => (share === null || share === undefined ? '–' : `${(100 * share).toFixed(digits)}%`);
const short = (n) => (Math.abs(n) >= 1e4 || (n && Math.abs(n) < 1e-3) ? n.toExponential(1) : String(+n.toPrecision(4)));

function size(bytes) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let i = 0;
  while (bytes >= 1000 && i < units.length - 1) {
    bytes /= 1000;
    i += 1;
  }
  return `${i ? bytes.toFixed(1) : bytes} ${units[i]}`;
}

/** The parts of the address after `#`, and its query: `#classes/12?text=a` gives [['classes', '12'], 'text=a']. */
function route() {
  const [, path, query] = /^#?\/?([^?]*)\??(.*)$/s.exec(location.hash);
  const parts = path.split('/').map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return [parts, query];
}

const href = (...parts) => `#${parts.map((part) => encodeURIComponent(part)).join('/')}`;

function useRoute() {
  const [now, set] = useState(route());
  useEffect(() => {
    const changed = () => set(route());
    addEventListener('hashchange', changed);
    return () => removeEventListener('hashchange', changed);
  }, []);
  return now;
}

/** Result of a promise as { value, error }; `load` is called again when `keys` change. */
function useLoaded(load, keys) {
  const [state, set] = useState({});
  useEffect(() => {
    let current = true;
    set((before) => ({ ...before, error: undefined }));
    load().then(
      (value) => current && set({ value }),
      (error) => current && set({ error: error.message }),
    );
    return () => {
      current = false;
    };
  }, keys);
  return state;
}

/**
 * A virtual list: only the visible rows are in the page. Arrows, Page Up, Page Down, Home and End move the mark, Enter
 * opens the marked row.
 */
function LongList({ count, height, row, chosen, open, label, columns }) {
  const box = useRef();
  const [view, setView] = useState({ top: 0, height: 600 });
  const [mark, setMark] = useState(0);
  const seen = useCallback(() => setView({ top: box.current.scrollTop, height: box.current.clientHeight || 600 }), []);
  useLayoutEffect(() => {
    seen();
    const watcher = new ResizeObserver(seen);
    watcher.observe(box.current);
    return () => watcher.disconnect();
  }, []);
  useEffect(() => {
    setMark(0);
    box.current.scrollTop = 0;
  }, [count]);
  const show = (i) => {
    const element = box.current;
    if (i * height < element.scrollTop) element.scrollTop = i * height;
    if ((i + 1) * height > element.scrollTop + element.clientHeight) element.scrollTop = (i + 1) * height - element.clientHeight;
  };
  const typed = (event) => {
    const page = Math.max(1, Math.floor(view.height / height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -count, End: count };
    if (event.key in steps) {
      const next = Math.min(count - 1, Math.max(0, mark + steps[event.key]));
      setMark(next);
      show(next);
      event.preventDefault();
    } else if (event.key === 'Enter' && count) {
      open(mark);
      event.preventDefault();
    }
  };
  const first = Math.max(0, Math.floor(view.top / height) - 8);
  const last = Math.min(count, Math.ceil((view.top + view.height) / height) + 8);
  const rows = [];
  for (let i = first; i < last; i += 1) {
    rows.push(html`<div
      key=${i}
      role="row"
      id=${`row-${i}`}
      aria-rowindex=${i + 1}
      aria-selected=${chosen(i)}
      class=${`row ${columns}${i === mark ? ' marked' : ''}${chosen(i) ? ' chosen' : ''}`}
      style=${{ top: `${i * height}px`, height: `${height}px` }}
      onClick=${() => {
        setMark(i);
        open(i);
      }}
    >${row(i)}</div>`);
  }
  return html`<div
    class="list"
    ref=${box}
    tabindex="0"
    role="grid"
    aria-label=${label}
    aria-rowcount=${count}
    aria-activedescendant=${count ? `row-${mark}` : undefined}
    onScroll=${seen}
    onKeyDown=${typed}
  ><div role="rowgroup" style=${{ height: `${count * height}px`, position: 'relative' }}>${rows}</div></div>`;
}

/** A heading that sorts by its column; a second click reverses the order. */
function Sort({ by, children, order, setOrder, rising }) {
  const now = order.by === by;
  const direction = now ? (order.up ? 'ascending' : 'descending') : '';
  return html`<span class=${by === 'name' ? '' : 'n'}><button aria-pressed=${now} title=${direction} onClick=${() => setOrder({ by, up: now ? !order.up : rising.includes(by) })}>
    ${children}${now ? html`<span aria-hidden="true">${order.up ? ' ▲' : ' ▼'}</span>` : null}</button></span>`;
}

/** Buttons for the pages of a list. */
function Pager({ offset, limit, total, go }) {
  if (total <= limit) return null;
  const last = Math.floor((total - 1) / limit) * limit;
  return html`<nav class="pager" aria-label="Pages">
    <button onClick=${() => go(0)} disabled=${!offset} aria-label="First page">«</button>
    <button onClick=${() => go(Math.max(0, offset - limit))} disabled=${!offset}>Previous</button>
    <span>${thousands(offset + 1)} to ${thousands(Math.min(total, offset + limit))} of ${thousands(total)}</span>
    <button onClick=${() => go(offset + limit)} disabled=${offset + limit >= total}>Next</button>
    <button onClick=${() => go(last)} disabled=${offset >= last} aria-label="Last page">»</button>
  </nav>`;
}

/** Figures with their names. */
const Figures = ({ of }) => html`<dl class="figures">${of
  .filter(([, value]) => value !== null && value !== undefined && value !== '')
  .map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;

const Bar = ({ share, tone }) => html`<span class="bar" aria-hidden="true"><span class=${tone} style=${{ width: `${Math.max(0, Math.min(100, 100 * share))}%` }}></span></span>`;

/** A button that copies a text, and says so. */
function Copy({ text, children }) {
  const [done, set] = useState('');
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      set('Copied');
    } catch {
      set('The browser refuses: select the text and copy it');
    }
  };
  return html`<button onClick=${copy}>${children}</button> <span class="quiet" role="status">${done}</span>`;
}

/** Error boundary of a view: shows the error in place of the view. */
class Guard extends preact.Component {
  componentDidCatch(error) {
    this.setState({ error });
  }

  render() {
    return this.state.error ? html`<p role="alert">This view failed: ${plain(this.state.error.message)}</p>` : this.props.children;
  }
}
