// Views of a build: overview, classes, duplicate clusters, dropped images, audit findings, decisions.

const PAGE = 60;
const CLUSTER_PAGE = 20;

/** Access to images and lists: from the page itself, or from the server of `animesion browse`. */
function storeOf(data) {
  const some = (items, offset, limit) => Promise.resolve({ total: items.length, items: items.slice(offset, offset + limit) });
  if (!data.live) {
    return {
      source: (item) => (item.image >= 0 ? `data:image/webp;base64,${data.images[item.image]}` : ''),
      samples: (label, offset, limit) => some((data.classes.samples || [])[label] || [], offset, limit),
      clusters: (conflicts, offset, limit) => some(data.clusters.items.filter((each) => !conflicts || each.conflict), offset, limit),
      pairs: (kind, offset, limit) => some(data.pairs.items[kind], offset, limit),
      strip: (pair) => (pair.image >= 0 ? `data:image/webp;base64,${data.images[pair.image]}` : ''),
      drops: (reason, offset, limit) => some((data.drops.find((each) => each.reason === reason) || { items: [] }).items, offset, limit),
    };
  }
  const ask = async (path, query) => {
    const answer = await fetch(`api/${path}?${new URLSearchParams(query)}`);
    if (!answer.ok) throw new Error((await answer.text()).slice(0, 300) || answer.statusText);
    return answer.json();
  };
  return {
    // an image that was never decoded has no size
    source: (item) => (item.kept || item.width !== 0 ? `api/image/${encodeURIComponent(item.key)}` : ''),
    samples: (label, offset, limit) => ask(`classes/${label}`, { offset, limit }),
    images: (filter, asOf, offset, limit) => ask('images', { ...filter, as_of: asOf, offset, limit }),
    map: (filter, asOf) => ask('map', { ...filter, as_of: asOf }),
    details: (key) => ask(`details/${encodeURIComponent(key)}`, {}),
    clusters: (conflicts, offset, limit) => ask('clusters', { conflicts: conflicts ? 1 : 0, offset, limit }),
    pairs: (kind, offset, limit) => ask('pairs', { kind, offset, limit }),
    strip: (pair) => `api/pairs/${pair.number}`,
    drops: (reason, offset, limit) => ask('drops', { reason, offset, limit }),
  };
}

// -- images ----------------------------------------------------------------------------------------------------------

function Card({ item, store, editor, lines, view }) {
  const source = store.source(item);
  const decided = editor && verdict(editor.decisions, item.key);
  const [broken, setBroken] = useState(false);
  const image = source && !broken
    ? html`<img src=${source} alt=${plain(item.key)} loading="lazy" decoding="async" onError=${() => setBroken(true)} />`
    : html`<span class="none">no image</span>`;
  const boxed = item.boxes && source && !broken ? html`<${Boxed} boxes=${item.boxes} decided=${editor && editor.decisions.box[item.key]}>${image}<//>` : image;
  const frame = editor
    ? html`<button class="frame" aria-pressed=${editor.selected.has(item.key)} aria-label=${`Select ${plain(item.key)}`} onClick=${() => editor.select(item.key)}>${boxed}</button>`
    : html`<span class="frame">${boxed}</span>`;
  const typed = (event) => {
    if (event.key !== 'v' || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    view();
  };
  return html`<li class=${`card${source && !broken ? '' : ' blank'}${item.kept ? ' kept' : ''}${item.kept === false ? ' dropped' : ''}`} data-key=${item.key} onKeyDown=${view && typed} onDblClick=${view && ((event) => event.target.closest('.frame') && view())}>
    ${frame}
    ${view ? html`<button class="enlarge" aria-label=${`View ${plain(item.key)} at full size`} title="full size (v)" onClick=${view}>⤢</button>` : null}
    ${decided ? html`<span class="badge"><${Name} text=${decided} /></span>` : null}
    <span class="lines">${lines(item)}</span>
    ${item.boxes && editor && editor.writable ? html`<button class="box" onClick=${() => editor.box(item.key)}>Box…</button>` : null}
  </li>`;
}

/** Images; `list` and the position `offset` of the first of them in it let a curator view them at full size. */
const Cards = ({ items, list, offset, store, editor, ...rest }) => html`<ul class=${items.some((item) => item.boxes && store.source(item)) ? 'cards large' : 'cards'}>${items.map((item, i) => html`<${Card} key=${item.key} item=${item} store=${store} editor=${editor}
  view=${editor && list ? () => editor.view(list, offset + i) : undefined} ...${rest} />`)}</ul>`;

/** Images that are all in the page, as a list to view at full size. */
const listOf = (items) => ({ total: items.length, load: (offset, limit) => Promise.resolve({ items: items.slice(offset, offset + limit) }) });

const Key = ({ item }) => (item.url
  ? html`<a class="key" href=${item.url} target="_blank" rel="noopener noreferrer"><${Name} text=${item.key} /></a>`
  : html`<span class="key"><${Name} text=${item.key} /></span>`);

// -- overview ----------------------------------------------------------------------------------------------------------

function Funnel({ data }) {
  const rows = data.drops.filter((each) => each.count);
  const most = Math.max(1, ...rows.map((each) => each.count));
  const share = (count) => percent(data.seen ? count / data.seen : null);
  return html`<table class="funnel">
    <caption>Where every image went</caption>
    <thead><tr><th scope="col">step</th><th scope="col" class="n">images</th><th scope="col" class="n">of seen</th><th scope="col" class="bars"><span class="unseen">share of the largest drop</span></th><th scope="col">meaning</th></tr></thead>
    <tbody>
      <tr class="total"><th scope="row">seen</th><td class="n">${thousands(data.seen)}</td><td class="n"></td><td class="bars"></td><td>listed by the source</td></tr>
      ${rows.map((each) => html`<tr><th scope="row"><a href=${href('dropped', each.reason)}><${Name} text=${each.reason} /></a></th>
        <td class="n">−${thousands(each.count)}</td><td class="n">${share(each.count)}</td><td class="bars"><${Bar} share=${each.count / most} tone="lost" /></td><td>${plain(each.meaning)}</td></tr>`)}
      <tr class="total"><th scope="row">kept</th><td class="n">${thousands(data.kept)}</td><td class="n">${share(data.kept)}</td><td class="bars"></td><td>in ${amount(data.classes.names.length, 'class', 'classes')}</td></tr>
    </tbody>
  </table>`;
}

/** Classes that are shown with an image at the top of the page. */
const COVERS = 24;

/** One image of each of the largest classes. */
function Covers({ data, totals, store }) {
  const largest = useMemo(() => totals.map((n, i) => [n, i]).filter(([n]) => n).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, COVERS).map(([, i]) => i), [totals]);
  const { value } = useLoaded(() => Promise.all(largest.map((label) => store.samples(label, 0, 1).then(({ items }) => items[0]))), [largest]);
  const shown = largest.map((label, i) => [label, value && value[i]]).filter(([, item]) => !value || (item && store.source(item)));
  if (!shown.length) return null;
  return html`<ul class="covers" aria-label="An image of each of the largest classes">${shown.map(([label, item]) => html`<li key=${label}><a href=${href('classes', label)}>
    ${item ? html`<img src=${store.source(item)} alt="" decoding="async" />` : html`<span class="none"></span>`}<${Name} text=${data.classes.names[label]} /></a></li>`)}</ul>`;
}

function Tail({ data, totals }) {
  const series = useMemo(() => {
    const sizes = totals.filter((n) => n > 0).sort((a, b) => b - a);
    return { x: sizes.map((_, i) => i + 1), series: [{ label: 'images', values: sizes, tone: 'accent' }], top: sizes[0] || 1 };
  }, [totals]);
  const bands = data.bands;
  /** Calls `draw` with the name, top and bottom of each band. */
  const banded = (plot, draw) => {
    const { ctx, bbox } = plot;
    const y = (value) => Math.min(bbox.top + bbox.height, Math.max(bbox.top, plot.valToPos(value, 'y', true)));
    const edges = [[bands.many_above, Infinity, 'many'], [bands.few_below, bands.many_above, 'medium'], [0, bands.few_below, 'few']];
    ctx.save();
    for (const [low, high, name] of edges) {
      const top = high === Infinity ? bbox.top : y(high);
      draw(ctx, bbox, name, top, low ? y(low) : bbox.top + bbox.height);
    }
    ctx.restore();
  };
  const shade = (plot) => banded(plot, (ctx, bbox, name, top, bottom) => {
    ctx.fillStyle = colour(`band-${name}`);
    ctx.fillRect(bbox.left, top, bbox.width, Math.max(0, bottom - top));
  });
  const names = (plot) => banded(plot, (ctx, bbox, name, top, bottom) => {
    if (bottom - top <= 18 * devicePixelRatio) return;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    const [right, width] = [bbox.left + bbox.width - 6 * devicePixelRatio, ctx.measureText(name).width];
    ctx.fillStyle = colour(`band-${name}`); // covers the grid lines behind the text
    ctx.fillRect(right - width - 2 * devicePixelRatio, top + 4 * devicePixelRatio, width + 4 * devicePixelRatio, 13 * devicePixelRatio);
    ctx.fillStyle = colour('soft');
    ctx.textAlign = 'right';
    ctx.fillText(name, right, top + 14 * devicePixelRatio);
  });
  const tail = data.tail;
  return html`<section aria-label="Long tail"><h2>Long tail</h2>
    ${tail ? html`<${Figures} of=${[
      ['Gini coefficient', tail.gini.toFixed(4)], ['imbalance factor (largest / smallest)', thousands(Math.round(tail.imbalance_factor * 10) / 10)],
      ['median class size', thousands(tail.median)], ['effective classes', thousands(Math.round(tail.effective_classes))]]} />` : null}
    <${Curves} ...${series} xLabel="rank of the class" yLabel="images in the class" logX=${series.x.length > 20} logY shade=${shade} names=${names}
      whole range=${() => [1, Math.max(bands.many_above * 2, series.top * 1.2)]} label="Images by rank of the class" />
    <p class="quiet">Bands by training images: ${['many', 'medium', 'few'].filter((name) => data.train_bands[name]).map((name) => `${name} ${amount(data.train_bands[name].classes, 'class', 'classes')}, ${amount(data.train_bands[name].images, 'image')}`).join('; ')}.
      Many is above ${bands.many_above}, few is below ${bands.few_below}.</p>
  </section>`;
}

function Balance({ data, totals }) {
  const all = data.kept || 1;
  const rows = data.splits.map((split) => {
    const counts = data.classes.counts[split.name];
    const share = split.samples / all;
    const without = counts.filter((n, i) => !n && totals[i]).length;
    // total variation distance between the class distributions of the split and of the dataset; 0 for equal ones
    const distance = split.samples ? counts.reduce((sum, n, i) => sum + Math.abs(n / split.samples - totals[i] / all), 0) / 2 : null;
    return { ...split, share, without, distance };
  });
  return html`<section aria-label="Splits"><h2>Splits</h2>
    <div class="wide"><table class="splits"><thead><tr><th scope="col">split</th><th scope="col" class="n">images</th><th scope="col">share</th><th scope="col" class="n">missing classes</th><th scope="col" class="n" title="Total variation distance between the class distributions of the split and of the dataset">class shift</th><th scope="col" class="n">size</th></tr></thead>
    <tbody>${rows.map((row) => html`<tr><th scope="row">${row.name}</th><td class="n">${thousands(row.samples)}</td><td><${Bar} share=${row.share} tone="held" /> ${percent(row.share)}</td>
      <td class="n">${thousands(row.without)}</td><td class="n">${percent(row.distance)}</td><td class="n">${size(row.bytes)}</td></tr>`)}</tbody></table></div>
    <p class="quiet">Strategy: ${plain(data.strategy)}. Class shift is the share of a split's images that would have to change class to match the dataset's class distribution.</p>
  </section>`;
}

function Overview({ data, totals, store }) {
  const lost = data.histograms.some((each) => each.dropped.some(Boolean));
  return html`<div class="overview">
    <p class="summary"><${Name} text=${data.summary} /></p>
    <${Covers} data=${data} totals=${totals} store=${store} />
    <${Figures} of=${[['images', thousands(data.kept)], ['classes', thousands(data.classes.names.length)], ['seen', thousands(data.seen)], ['fetched', thousands(data.fetched)],
      ['duplicate clusters', thousands(data.clusters.total)], ['source', plain(data.source)], ['licence', plain(data.licence)], ['recipe', data.recipe.slice(0, 10)]]} />
    <section aria-label="Funnel"><${Funnel} data=${data} /></section>
    <${Tail} data=${data} totals=${totals} />
    <${Balance} data=${data} totals=${totals} />
    ${data.histograms.length ? html`<section aria-label="Quality"><h2>Size and quality</h2>${lost ? html`<p class="quiet"><span class="dot kept"></span> kept <span class="dot dropped"></span> dropped</p>` : null}
      <div class="histograms">${data.histograms.map((each) => html`<${Histogram} ...${each} />`)}</div></section>` : null}
    ${data.notes.length ? html`<section aria-label="Notes"><h2>Notes</h2><ul>${data.notes.map((note) => html`<li><${Name} text=${note} /></li>`)}</ul></section>` : null}
  </div>`;
}

// -- classes -----------------------------------------------------------------------------------------------------------

function Classes({ data, totals, store, editor, chosen }) {
  const { names, counts } = data.classes;
  const [query, setQuery] = useState('');
  const [order, setOrder] = useState({ by: 'total', up: false });
  const search = useRef();
  const splits = data.splits.map((each) => each.name);
  const folded = useMemo(() => names.map((name) => name.normalize('NFKC').toLowerCase()), [names]);
  const value = (by) => (by === 'id' ? (i) => i : by === 'total' ? (i) => totals[i] : (i) => counts[by][i]);
  const rows = useMemo(() => {
    const wanted = query.normalize('NFKC').toLowerCase().trim();
    const found = [];
    folded.forEach((name, i) => {
      if (!wanted || name.includes(wanted) || String(i) === wanted) found.push(i);
    });
    const of = value(order.by);
    const compare = order.by === 'name' ? (a, b) => (names[a] < names[b] ? -1 : names[a] > names[b] ? 1 : 0) : (a, b) => of(a) - of(b);
    found.sort((a, b) => (order.up ? compare(a, b) : compare(b, a)) || a - b);
    return found;
  }, [query, order, names]);
  useEffect(() => {
    const typed = (event) => {
      if (event.key === '/' && !event.target.matches('input, textarea, select')) {
        search.current.focus();
        event.preventDefault();
      }
    };
    addEventListener('keydown', typed);
    return () => removeEventListener('keydown', typed);
  }, []);
  const sort = { order, setOrder, rising: ['name', 'id'] };
  const id = chosen === undefined || !(Number(chosen) in names) ? null : Number(chosen);
  return html`<div class=${`classes${id === null ? '' : ' open'}`}>
    <div class="table">
      <label class="search">Search <input ref=${search} type="search" value=${query} onInput=${(event) => setQuery(event.target.value)} placeholder="name or id (press /)" /></label>
      <p class="quiet" role="status">${thousands(rows.length)} of ${thousands(names.length)} classes</p>
      <div class="row head" role="group" aria-label="Sort by"><${Sort} ...${sort} by="id">id<//><${Sort} ...${sort} by="name">class<//><${Sort} ...${sort} by="total">all<//>${splits.map((split) => html`<${Sort} ...${sort} by=${split}>${split}<//>`)}</div>
      <${LongList} count=${rows.length} height=${34} label="Classes" columns="" chosen=${(i) => rows[i] === id} open=${(i) => { location.hash = href('classes', rows[i]); }}
        row=${(i) => html`<span role="gridcell" class="n quiet">${rows[i]}</span><span role="gridcell"><${Name} text=${names[rows[i]]} /></span><span role="gridcell" class="n">${thousands(totals[rows[i]])}</span>
          ${splits.map((split) => html`<span role="gridcell" class="n quiet">${thousands(counts[split][rows[i]])}</span>`)}`} />
    </div>
    ${id === null ? html`<p class="quiet hint">Select a class to see its images.</p>` : html`<${Class} key=${id} ...${{ data, totals, store, editor, id, splits }} />`}
  </div>`;
}

function Class({ data, totals, store, editor, id, splits }) {
  const [offset, go] = useState(0);
  const { value, error } = useLoaded(() => store.samples(id, offset, PAGE), [id, offset]);
  return html`<section class="detail" aria-label="Class">
    <a class="back" href="#classes">All classes</a>
    <h2><${Name} text=${data.classes.names[id]} /></h2>
    <p class="quiet">class ${id}: ${amount(totals[id], 'image')}, ${splits.map((split) => `${thousands(data.classes.counts[split][id])} ${split}`).join(', ')}</p>
    ${error ? html`<p role="alert">${plain(error)}</p>` : null}
    ${value ? html`<${Cards} items=${value.items} store=${store} editor=${editor} offset=${offset} list=${{ total: value.total, load: (from, limit) => store.samples(id, from, limit) }} lines=${(item) => html`<${Key} item=${item} /><span class="quiet">${item.split}</span>`} />
      <${Pager} offset=${offset} limit=${PAGE} total=${value.total} go=${go} />
      ${!data.live && value.total < totals[id] ? html`<p class="quiet">${thousands(value.total)} of ${thousands(totals[id])} are in this file; animesion browse shows all.</p>` : null}` : html`<p class="quiet">Loading…</p>`}
  </section>`;
}

// -- clusters ----------------------------------------------------------------------------------------------------------

function Clusters({ data, store, editor }) {
  const [conflicts, setConflicts] = useState(false);
  const [offset, go] = useState(0);
  const { value, error } = useLoaded(() => store.clusters(conflicts, offset, CLUSTER_PAGE), [conflicts, offset]);
  return html`<div>
    <h2>Duplicate clusters</h2>
    <p>${amount(data.clusters.total, 'cluster')} of duplicates, ${thousands(data.clusters.conflicts)} of them with several labels.</p>
    <label class="check"><input type="checkbox" checked=${conflicts} onChange=${(event) => { setConflicts(event.target.checked); go(0); }} /> only clusters with several labels</label>
    ${error ? html`<p role="alert">${plain(error)}</p>` : null}
    ${value ? html`<div class="clusters">${value.items.map((each) => html`<article class="cluster" key=${each.name} data-cluster=${each.name}>
      <h3><${Name} text=${each.name} />${each.conflict ? html` <span class="tag">several labels</span>` : null}</h3>
      ${editor && editor.writable ? html`<p class="decide">
        <button onClick=${() => editor.act('same', each.members.map((item) => item.key))}>All the same</button>
        <button onClick=${() => editor.act('different', each.members.map((item) => item.key))}>All different</button></p>` : null}
      <${Cards} items=${each.members} store=${store} editor=${editor} offset=${0} list=${listOf(each.members)} lines=${(item) => html`<${Key} item=${item} /><${Name} text=${item.label} />
        <span class="quiet">${item.width}×${item.height}, ${size(item.bytes)}</span>
        ${item.kept ? html`<strong class="good">kept: ${item.split}</strong>` : html`<span class="bad"><${Name} text=${item.reason} />${item.keeper ? html`, keeper <${Name} text=${item.keeper} />` : null}</span>`}
        ${item.detail ? html`<${Name} quiet text=${item.detail} />` : null}`} />
      ${each.more ? html`<p class="quiet">and ${thousands(each.more)} more</p>` : null}
    </article>`)}</div>` : html`<p class="quiet">Loading…</p>`}
    ${value ? html`<${Pager} offset=${offset} limit=${CLUSTER_PAGE} total=${value.total} go=${(to) => { go(to); scrollTo(0, 0); }} />
      ${!data.live && !conflicts && value.total < data.clusters.total ? html`<p class="quiet">${thousands(value.total)} of ${thousands(data.clusters.total)} clusters are in this file; animesion browse shows all.</p>` : null}` : null}
  </div>`;
}

// -- dropped, audit ----------------------------------------------------------------------------------------------------

function Dropped({ data, store, editor, reason }) {
  const reasons = data.drops.filter((each) => each.count);
  // first, the most frequent one of those whose images can be shown
  const first = [...reasons].sort((a, b) => b.pictured - a.pictured || b.count - a.count)[0];
  const now = reasons.find((each) => each.reason === reason) || first;
  if (!now) return html`<p>Nothing was dropped.</p>`;
  return html`<div>
    <h2>Dropped images</h2>
    <nav class="reasons" aria-label="Reasons">${reasons.map((each) => html`<a href=${href('dropped', each.reason)} aria-current=${each === now ? 'true' : undefined}><${Name} text=${each.reason} /> <span class="quiet">${thousands(each.count)}</span></a>`)}</nav>
    <${Reason} key=${now.reason} data=${data} store=${store} editor=${editor} now=${now} />
  </div>`;
}

function Reason({ data, store, editor, now }) {
  const [offset, go] = useState(0);
  const { value, error } = useLoaded(() => store.drops(now.reason, offset, PAGE), [now.reason, offset]);
  return html`<p><strong>${thousands(now.count)}</strong> ${now.count === 1 ? 'image' : 'images'}: ${plain(now.meaning)}.</p>
    ${error ? html`<p role="alert">${plain(error)}</p>` : null}
    ${value ? html`<${Cards} items=${value.items} store=${store} editor=${editor} offset=${offset} list=${{ total: value.total, load: (from, limit) => store.drops(now.reason, from, limit) }} lines=${(item) => html`<${Key} item=${item} /><${Name} text=${item.label} />
      ${item.detail ? html`<${Name} quiet text=${item.detail} />` : null}${item.keeper ? html`<span class="quiet">keeper <${Name} text=${item.keeper} /></span>` : null}
      <${Name} quiet text=${item.source_id} />`} />
      <${Pager} offset=${offset} limit=${PAGE} total=${value.total} go=${go} />
      ${!data.live && value.total < now.count ? html`<p class="quiet">${thousands(value.total)} of ${thousands(now.count)} are in this file; animesion browse shows all.</p>` : null}` : html`<p class="quiet">Loading…</p>`}`;
}

function Audit({ audit, store, editor, live }) {
  return html`<div><h2>Suspicious labels</h2>
    <p>${amount(audit.total, 'finding')} of animesion audit${audit.model ? html` with <${Name} text=${audit.model} />` : null}, the most suspicious first. They do not change the dataset.</p>
    ${live ? html`<${Cards} items=${audit.items} store=${store} editor=${editor} offset=${0} list=${listOf(audit.items)} lines=${(item) => html`<${Key} item=${item} /><${Name} text=${item.label} />
      <span>${item.suggested ? html`looks like <${Name} text=${item.suggested} />` : 'far from its class'}</span><span class="quiet">${item.score}</span>`} />` : html`<div class="wide"><table>
      <thead><tr><th scope="col">image</th><th scope="col">label</th><th scope="col">looks like</th><th scope="col" class="n">score</th></tr></thead>
      <tbody>${audit.items.map((each) => html`<tr><td><${Name} text=${each.key} /></td><td><${Name} text=${each.label} /></td><td><${Name} text=${each.suggested || 'far from its class'} /></td><td class="n">${each.score}</td></tr>`)}</tbody></table></div>`}
  </div>`;
}

function Decided({ data, editor }) {
  const { decisions } = editor;
  const empty = !countDecisions(decisions);
  const Row = ({ what, keys, more }) => html`<tr><td>${what}</td><td><div class="decided-images">${keys.map((key, i) => html`<button onClick=${() => editor.view(listOf(keys.map((each) => ({ key: each }))), i)} title="full size">
    <img src=${`api/image/${encodeURIComponent(key)}`} alt="" loading="lazy" onError=${(event) => event.target.remove()} /><${Name} text=${key} /></button>`)}</div></td><td>${more ? html`<${Name} text=${more} />` : null}</td>
    <td><button disabled=${!editor.writable} onClick=${() => editor.act('forget', keys)}>Reset</button></td></tr>`;
  return html`<div><h2>Decisions</h2>
    ${editor.revision() ? html`<p>Saved in <${Name} text=${data.file} />. This command builds the dataset again with them:</p>
    <pre class="command" tabindex="0">${plain(data.rebuild)}</pre>
    <p class="copy"><${Copy} text=${data.rebuild}>Copy<//> <${Undo} editor=${editor} /></p>` : html`<p>${empty ? '' : 'The build applied these. '}Changes will be saved in <${Name} text=${data.file} />.</p>`}
    ${empty ? html`<p class="quiet">No decisions yet: select images in Images, Classes, Clusters or Dropped, or turn a verdict in Copies or Alternates.</p>` : html`<div class="wide"><table>
      <thead><tr><th scope="col">decision</th><th scope="col">images</th><th scope="col">label</th><th scope="col">reset</th></tr></thead><tbody>
      ${decisions.exclude.map((key) => html`<${Row} what="exclude" keys=${[key]} />`)}
      ${Object.entries(decisions.label).map(([key, label]) => html`<${Row} what="label" keys=${[key]} more=${label} />`)}
      ${decisions.same.map((keys) => html`<${Row} what="same" keys=${keys} />`)}
      ${decisions.several.map((key) => html`<${Row} what="two characters" keys=${[key]} />`)}
      ${Object.entries(decisions.box).map(([key, box]) => html`<${Row} what="box" keys=${[key]} more=${box.map((value) => `${(100 * value).toFixed(1)}%`).join(', ')} />`)}
      ${decisions.different.map((keys) => html`<${Row} what="different" keys=${keys} />`)}
      ${decisions.pairs.map((each) => html`<tr><td>pair: ${each.verdict}</td><td>${each.images.map((id) => html`<code>${id.slice(0, 12)}…${id.slice(64)}</code> `)}</td><td></td>
        <td><button disabled=${!editor.writable} onClick=${() => editor.turn(each.images, '')}>Reset</button></td></tr>`)}</tbody></table></div>`}
  </div>`;
}

function Dataset({ data, at, query }) {
  const store = useMemo(() => storeOf(data), []);
  const editor = useDecisions(data);
  const totals = useMemo(() => data.classes.names.map((_, i) => data.splits.reduce((sum, split) => sum + data.classes.counts[split.name][i], 0)), []);
  const common = { data, totals, store, editor };
  const view = {
    images: () => editor && html`<${Images} data=${data} store=${store} editor=${editor} query=${query} />`,
    classes: () => html`<${Classes} ...${common} chosen=${at[1]} />`,
    clusters: () => html`<${Clusters} ...${common} />`,
    copies: () => html`<${PairKinds} ...${common} kinds=${['conflict', 'copy']} chosen=${at[1]} title="Copies" />`,
    alternates: () => html`<${PairKinds} ...${common} kinds=${['alternate', 'part']} chosen=${at[1]} title="Alternates and parts" />`,
    dropped: () => html`<${Dropped} ...${common} reason=${at[1]} />`,
    audit: () => data.audit && html`<${Audit} audit=${data.audit} store=${store} editor=${editor} live=${data.live} />`,
    decisions: () => editor && html`<${Decided} data=${data} editor=${editor} />`,
  }[at[0]];
  return html`<${Guard} key=${at[0]}>${(view && view()) || html`<${Overview} ...${common} />`}<//>${editor ? html`<${Actions} editor=${editor} decidable=${data.decidable} />` : null}
    ${editor && editor.viewing ? html`<${Viewer} key="viewer" editor=${editor} store=${store} decidable=${data.decidable} resized=${data.resized} />` : null}
    ${editor && editor.boxing ? html`<${BoxDialog} key=${editor.boxing} editor=${editor} store=${store} />` : null}
    ${editor ? html`<datalist id="labels">${data.classes.names.slice(0, 5000).map((name) => html`<option value=${name}></option>`)}</datalist>` : null}`;
}

const datasetTabs = (data) => [
  ['overview', 'Overview'], ...(data.live ? [['images', 'Images']] : []), ['classes', 'Classes'], ['clusters', 'Clusters'], ['copies', 'Copies'], ['alternates', 'Alternates'], ['dropped', 'Dropped'],
  ...(data.audit ? [['audit', 'Audit']] : []), ...(data.live ? [['decisions', 'Decisions']] : []),
];
