// Pairs of images that the search for copies found: side by side in one frame, with the difference lit.

const PAIR_PAGE = 20;

/** Name, meaning and order of each kind of pair. */
const PAIR_KINDS = {
  conflict: ['Label conflicts', 'copies under two labels; with equal bytes or pixels, the first image of each label'],
  copy: ['Copies', 'one drawing; those that differ most come first'],
  alternate: ['Alternates', 'a detail differs: both stay, in one split; those that differ least come first'],
  part: ['Parts', 'parts of one image that overlap: both stay, in one split; those with the fewest common points come first'],
};

const sameIds = (one, other) => [...one].sort().join() === [...other].sort().join();

/** The decisions with another verdict on a pair; none for an empty one. */
function turn(before, ids, verdict) {
  const others = before.pairs.filter((each) => !sameIds(each.images, ids));
  return { ...before, pairs: verdict ? [...others, { images: [...ids].sort(), verdict }] : others };
}

function PairSide({ item, editor, view }) {
  const chosen = editor && editor.selected.has(item.key);
  return html`<div class="side" data-key=${item.key}><${Key} item=${item} /><strong><${Name} text=${item.label} /></strong>
    <span class="quiet">${item.width}×${item.height}, ${size(item.bytes)}</span>
    ${item.kept ? html`<span class="good">kept: ${item.split}</span>` : html`<span class="bad"><${Name} text=${item.reason} /></span>`}
    ${editor ? html`<button aria-pressed=${chosen ? 'true' : 'false'} onClick=${() => editor.select(item.key)}>${chosen ? 'Selected' : 'Select'}</button> <button onClick=${view}>Full size</button>` : null}</div>`;
}

function PairCard({ pair, store, editor }) {
  const source = store.strip(pair);
  const made = editor && editor.decisions.pairs.find((each) => sameIds(each.images, pair.ids));
  const decided = editor ? made && made.verdict : pair.decided;
  const equal = pair.verdict.startsWith('equal');
  const labels = pair.first.label !== pair.second.label;
  return html`<article class="pair" data-pair=${`${pair.first.key} ${pair.second.key}`}>
    <h3><span class="verdict">${plain(pair.verdict)}</span>${labels ? html` <span class="tag">two labels</span>` : null}${decided ? html` <span class="tag decided">by decision: ${decided}</span>` : null}</h3>
    ${source ? html`<img class="strip" loading="lazy" src=${source} alt=${`${plain(pair.first.key)}, ${plain(pair.second.key)} in its frame, and what differs`} />` : html`<p class="none">no images: they need raw/</p>`}
    <div class="sides">${[pair.first, pair.second].map((item, i) => html`<${PairSide} item=${item} editor=${editor} view=${() => editor.view(listOf([pair.first, pair.second]), i)} />`)}
      <div class="side quiet">${equal ? null : html`<span>difference ${pair.residual.toFixed(0)} levels</span><span>${pair.inliers ? `${thousands(pair.inliers)} points agree` : 'aligned as a whole'}</span>`}
        ${pair.whole ? html`<span>whole images</span>` : null}${pair.how ? html`<${Name} text=${pair.how} />` : null}</div></div>
    ${editor && editor.writable && !equal ? html`<p class="decide">${['copy', 'alternate', 'different'].map((verdict) => html`<button aria-pressed=${decided === verdict ? 'true' : 'false'} onClick=${() => editor.turn(pair.ids, decided === verdict ? '' : verdict)}>${verdict}</button>`)}</p>` : null}
  </article>`;
}

function PairKinds({ data, store, editor, kinds, chosen, title }) {
  const { totals, published } = data.pairs;
  const now = kinds.includes(chosen) ? chosen : kinds.find((kind) => totals[kind]) || kinds[0];
  const at = kinds[0] === 'conflict' ? 'copies' : 'alternates';
  return html`<div>
    <h2>${title}</h2>
    <nav class="reasons" aria-label="Kinds">${kinds.map((kind) => html`<a href=${href(at, kind)} aria-current=${kind === now ? 'true' : undefined}>${PAIR_KINDS[kind][0]} <span class="quiet">${thousands(totals[kind])}</span></a>`)}</nav>
    <p>${amount(totals[now], 'pair')}: ${PAIR_KINDS[now][1]}.</p>
    <p class="quiet">${totals[now] ? 'Left: the first image. Middle: the second one, brought into its frame and its tones. Right: what differs beyond the noise, lit; grey where the second image shows nothing.' : ''}${published ? ` ${amount(published, 'pair')} with images of published datasets, not shown.` : ''}</p>
    <${PairList} key=${now} ...${{ data, store, editor, kind: now }} />
  </div>`;
}

function PairList({ data, store, editor, kind }) {
  const [offset, go] = useState(0);
  const { value, error } = useLoaded(() => store.pairs(kind, offset, PAIR_PAGE), [kind, offset]);
  if (error) return html`<p role="alert">${plain(error)}</p>`;
  if (!value) return html`<p class="quiet">Loading…</p>`;
  return html`<div class="pairs">${value.items.map((pair) => html`<${PairCard} key=${`${pair.first.key} ${pair.second.key}`} ...${{ pair, store, editor }} />`)}</div>
    <${Pager} offset=${offset} limit=${PAIR_PAGE} total=${value.total} go=${(to) => { go(to); scrollTo(0, 0); }} />
    ${!data.live && value.total < data.pairs.totals[kind] ? html`<p class="quiet">${thousands(value.total)} of ${thousands(data.pairs.totals[kind])} pairs are in this file; animesion browse shows all.</p>` : null}`;
}
