// Views of a training run: curves, figures, accuracy by class size, confusions, mistakes.

/** Metrics lines of one kind as columns over a common axis; null for values that a line lacks. */
function columnsOf(lines, axis) {
  const names = [...new Set(lines.flatMap((line) => Object.keys(line)))].filter((name) => !['kind', 'step', 'epoch'].includes(name));
  return { x: lines.map((line) => line[axis]), names, of: (name) => lines.map((line) => (typeof line[name] === 'number' ? line[name] : null)) };
}

const TONES = ['accent', 'second', 'third', 'fourth', 'fifth'];

function RunCurves({ data }) {
  const groups = useMemo(() => {
    const found = [];
    for (const [lines, axis, label] of [[data.epochs, 'epoch', 'epoch'], [data.steps, 'step', 'optimizer step']]) {
      if (!lines.length) continue;
      const columns = columnsOf(lines, axis);
      const plots = [
        ['Accuracy on the validation split', (name) => /top_|macro|accuracy|f1/.test(name), 'images that are right', 'share'],
        ['Losses', (name) => /loss|nll/.test(name), 'loss'],
        ['Learning rate', (name) => name === 'lr', 'learning rate'],
        ['Speed', (name) => name === 'images_per_second', 'images per second'],
      ];
      const used = new Set(plots.flatMap(([, chosen]) => columns.names.filter(chosen)));
      plots.push(['Other', (name) => !used.has(name), 'value']);
      for (const [title, chosen, words, unit] of plots) {
        const names = columns.names.filter(chosen);
        if (names.length) found.push({ title: `${title}, by ${axis}`, x: columns.x, label, words, unit, series: names.slice(0, 12).map((name, i) => ({ label: name.replaceAll('_', ' '), values: columns.of(name), tone: TONES[i % TONES.length] })) });
      }
    }
    return found;
  }, []);
  if (!groups.length) return html`<p class="quiet">No metrics yet: the run has no metrics.jsonl.</p>`;
  return html`<div class="plots">${groups.map((each) => html`<section><h3>${each.title}</h3><${Curves} x=${each.x} series=${each.series} xLabel=${each.label} yLabel=${each.words} unit=${each.unit} whole tall=${220} label=${each.title} /></section>`)}</div>`;
}

/** Largest class over smallest one from which their sizes have a logarithmic axis. */
const WIDE = 20;

function Frequency({ classes }) {
  const series = useMemo(() => {
    const rows = classes.filter((each) => each.train_images > 0 && each.accuracy !== null).sort((a, b) => a.train_images - b.train_images || a.class_id - b.class_id);
    return { x: rows.map((each) => each.train_images), series: [{ label: 'accuracy of a class', values: rows.map((each) => each.accuracy), points: true, tone: 'accent' }] };
  }, []);
  if (!series.x.length) return null;
  const wide = series.x[series.x.length - 1] >= WIDE * series.x[0];
  return html`<section aria-label="Accuracy by class size"><h2>Accuracy by class size</h2>
    <${Curves} ...${series} xLabel="training images of the class" yLabel="accuracy" unit="share" logX=${wide} whole range=${() => [-0.02, 1.02]} label="Accuracy of each class by its number of training images" /></section>`;
}

/** Confusion matrix of the most confused classes. */
function Confusion({ pairs, classes }) {
  const ids = useMemo(() => {
    const weight = new Map();
    for (const each of pairs) for (const id of [each.true_id, each.predicted_id]) weight.set(id, (weight.get(id) || 0) + each.images);
    return [...weight].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 24).map(([id]) => id).sort((a, b) => a - b);
  }, []);
  if (!ids.length) return null;
  const names = new Map(classes.map((each) => [each.class_id, each.name]));
  const counts = new Map(pairs.map((each) => [`${each.true_id} ${each.predicted_id}`, each]));
  const name = (id) => names.get(id) ?? String(id);
  const tests = new Map(classes.map((each) => [each.class_id, each]));
  return html`<section aria-label="Confusion"><h2>Confusion</h2>
    <p class="quiet">The ${ids.length} classes with the largest confusions. Rows are true classes, columns are predicted classes, the diagonal is the accuracy in percent.</p>
    <div class="wide"><table class="matrix"><thead><tr><th scope="col">true class</th>${ids.map((id) => html`<th scope="col"><span><${Name} text=${name(id)} /></span></th>`)}</tr></thead>
    <tbody>${ids.map((row) => html`<tr><th scope="row"><${Name} text=${name(row)} /></th>${ids.map((column) => {
      const each = counts.get(`${row} ${column}`);
      const own = row === column && tests.get(row);
      const share = own ? own.accuracy : each ? each.share_of_class : 0;
      const title = own ? `${plain(name(row))}: ${percent(own.accuracy)} correct` : each ? `${thousands(each.images)} of ${plain(name(row))} predicted as ${plain(name(column))}` : '';
      return html`<td title=${title} class=${own ? 'own' : 'miss'} style=${{ '--share': share || 0 }}>${own ? (own.accuracy === null ? '' : Math.round(100 * own.accuracy)) : each ? each.images : ''}</td>`;
    })}</tr>`)}</tbody></table></div></section>`;
}

function RunClasses({ classes }) {
  const [query, setQuery] = useState('');
  const [order, setOrder] = useState({ by: 'accuracy', up: true });
  const rows = useMemo(() => {
    const wanted = query.normalize('NFKC').toLowerCase().trim();
    const found = classes.filter((each) => !wanted || each.name.normalize('NFKC').toLowerCase().includes(wanted));
    const rank = (value) => (value === null ? Infinity : value);
    found.sort((a, b) => {
      const [one, other] = order.by === 'name' ? [a.name, b.name] : [rank(a[order.by]), rank(b[order.by])];
      return (order.up ? 1 : -1) * (one < other ? -1 : one > other ? 1 : 0) || b.test_images - a.test_images || a.class_id - b.class_id;
    });
    return found;
  }, [query, order]);
  const sort = { order, setOrder, rising: ['name', 'train_images', 'test_images', 'accuracy', 'f1'] };
  return html`<div class="table wideclasses"><h2>Classes</h2>
    <label class="search">Search <input type="search" value=${query} onInput=${(event) => setQuery(event.target.value)} /></label>
    <p class="quiet" role="status">${thousands(rows.length)} of ${thousands(classes.length)} classes</p>
    <div class="row head result" role="group" aria-label="Sort by"><${Sort} ...${sort} by="name">class<//><${Sort} ...${sort} by="train_images">train<//><${Sort} ...${sort} by="test_images">test<//><${Sort} ...${sort} by="accuracy">accuracy<//><${Sort} ...${sort} by="f1">F1<//><span>predicted as</span></div>
    <${LongList} count=${rows.length} height=${34} label="Classes" columns="result" chosen=${() => false} open=${() => {}} row=${(i) => html`<span role="gridcell"><${Name} text=${rows[i].name} /></span>
      <span role="gridcell" class="n">${thousands(rows[i].train_images)}</span><span role="gridcell" class="n">${thousands(rows[i].test_images)}</span><span role="gridcell" class="n">${percent(rows[i].accuracy)}</span>
      <span role="gridcell" class="n">${percent(rows[i].f1)}</span><span role="gridcell">${rows[i].confused_with_name ? html`<${Name} text=${rows[i].confused_with_name} /> ${thousands(rows[i].confusions)}` : null}</span>`} />
  </div>`;
}

function Pairs({ pairs }) {
  return html`<div><h2>Largest confusions</h2>${pairs.length ? html`<div class="wide"><table><thead><tr><th scope="col">class</th><th scope="col">predicted as</th><th scope="col" class="n">images</th><th scope="col" class="n">of the class</th><th scope="col" class="n">of all errors</th></tr></thead>
    <tbody>${pairs.map((each) => html`<tr><td><${Name} text=${each.true_name} /></td><td><${Name} text=${each.predicted_name} /></td><td class="n">${thousands(each.images)}</td><td class="n">${percent(each.share_of_class)}</td><td class="n">${percent(each.share_of_errors)}</td></tr>`)}</tbody></table></div>` : html`<p class="quiet">No confusions.</p>`}</div>`;
}

/** Misclassified images by descending confidence: as thumbnails if the report was written with `--data`, else a table. */
function Mistakes({ data }) {
  if (!data.images.length) {
    return html`<div><h2>Most confident mistakes</h2><p class="quiet">Run animesion report with --data to show the images.</p><div class="wide"><table>
      <thead><tr><th scope="col">image</th><th scope="col">class</th><th scope="col">predicted as</th><th scope="col" class="n">confidence</th></tr></thead>
      <tbody>${data.mistakes.map((each) => html`<tr><td><${Name} text=${each.key} /></td><td><${Name} text=${each.true_name} /></td><td><${Name} text=${each.predicted_name} /></td><td class="n">${percent(each.confidence)}</td></tr>`)}</tbody></table></div></div>`;
  }
  const store = { source: (item) => (item.image >= 0 ? `data:image/webp;base64,${data.images[item.image]}` : '') };
  return html`<div><h2>Most confident mistakes</h2><${Cards} items=${data.mistakes} store=${store} lines=${(item) => html`<${Key} item=${item} /><${Name} text=${item.true_name} />
    <span class="bad">predicted as <${Name} text=${item.predicted_name} /></span><span class="quiet">confidence ${percent(item.confidence)}</span>`} /></div>`;
}

function Calibration({ bins }) {
  const rows = bins.filter((each) => each.samples && each.accuracy !== null && each.confidence !== null);
  const series = useMemo(() => [{ label: 'accuracy', values: rows.map((each) => each.accuracy), tone: 'accent' }, { label: 'calibrated', values: rows.map((each) => each.confidence), tone: 'soft' }], []);
  const x = useMemo(() => rows.map((each) => each.confidence), []);
  return rows.length < 2 ? null : html`<section aria-label="Calibration"><h2>Calibration</h2><${Curves} x=${x} series=${series} xLabel="confidence" yLabel="accuracy" unit="share" range=${() => [0, 1]} label="Accuracy against confidence" /></section>`;
}

/** Metrics of a tagger: all tags, categories, and bands of frequency. */
function Tags({ found }) {
  const columns = [['map', 'mAP'], ['base_rate', 'base rate'], ['macro_f1', 'macro F1'], ['micro_f1', 'micro F1'], ['precision', 'precision'], ['recall', 'recall']];
  return html`<${Figures} of=${[['test images', thousands(found.samples)], ['split', plain(found.split)], ['weights', plain(found.weights)]]} />
    <section><h2>Tags</h2><div class="wide"><table><thead><tr><th scope="col">tags</th><th scope="col" class="n">number</th><th scope="col" class="n">tested</th>${columns.map(([, title]) => html`<th scope="col" class="n">${title}</th>`)}</tr></thead>
    <tbody>${found.tags.map((each) => html`<tr><th scope="row">${each.name}</th><td class="n">${thousands(each.tags)}</td><td class="n">${thousands(each.tested)}</td>${columns.map(([name]) => html`<td class="n">${percent(each[name])}</td>`)}</tr>`)}</tbody></table></div></section>`;
}

function Run({ data, at }) {
  const found = data.evaluation;
  if (at[0] === 'classes' && data.classes.length) return html`<${RunClasses} classes=${data.classes} />`;
  if (at[0] === 'confusions' && found && !found.tags) return html`<${Confusion} pairs=${data.confusions} classes=${data.classes} /><${Pairs} pairs=${data.confusions} />`;
  if (at[0] === 'mistakes' && data.mistakes.length) return html`<${Mistakes} data=${data} />`;
  const between = (interval) => (interval ? ` (${percent(interval.low)} to ${percent(interval.high)})` : '');
  const bands = Object.fromEntries(Object.entries((found && found.bands) || {}).filter(([, band]) => band.classes));
  const pictured = data.mistakes.filter((each) => each.image >= 0).slice(0, COVERS);
  return html`<div class="overview">
    ${found && found.tags ? html`<${Tags} found=${found} />` : found ? html`<${Figures} of=${[['test images', thousands(found.samples)], ['top-1', `${percent(found.top_1)}${between(found.top_1_interval)}`], [`top-${found.k}`, percent(found.top_5)],
      ['macro accuracy', `${percent(found.macro_accuracy)}${between(found.macro_accuracy_interval)}`], ['macro F1', percent(found.macro_f1)], ['calibration error', percent(found.calibration_error)],
      ['split', plain(found.split)], ['weights', plain(found.weights)]]} />
      ${Object.keys(bands).length ? html`<section><h2>By number of training images</h2><div class="wide"><table><thead><tr><th scope="col">band</th><th scope="col" class="n">classes</th><th scope="col" class="n">tested</th><th scope="col" class="n">images</th><th scope="col" class="n">top-1</th><th scope="col" class="n">macro accuracy</th></tr></thead>
      <tbody>${['many', 'medium', 'few'].filter((name) => bands[name]).map((name) => html`<tr><th scope="row">${name}</th><td class="n">${thousands(bands[name].classes)}</td><td class="n">${thousands(bands[name].tested)}</td><td class="n">${thousands(bands[name].samples)}</td><td class="n">${percent(bands[name].top_1)}</td><td class="n">${percent(bands[name].macro_accuracy)}</td></tr>`)}</tbody></table></div></section>` : null}` : html`<p class="quiet">No evaluation yet: the run has no report/evaluation.json.</p>`}
    ${pictured.length ? html`<section aria-label="Most confident mistakes"><h2><a href="#mistakes">Most confident mistakes</a></h2>
      <ul class="covers">${pictured.map((each) => html`<li key=${each.key}><a href="#mistakes"><img src=${`data:image/webp;base64,${data.images[each.image]}`} alt=${plain(each.key)} decoding="async" /><${Name} text=${each.true_name} /><span class="bad"><${Name} text=${`as ${each.predicted_name}`} /></span></a></li>`)}</ul></section>` : null}
    <${RunCurves} data=${data} />
    ${data.classes.length ? html`<${Frequency} classes=${data.classes} />` : null}
    ${found && found.bins ? html`<${Calibration} bins=${found.bins} />` : null}
    ${data.settings ? html`<section><h2>Recipe</h2><pre tabindex="0">${data.settings.split('\n').map(plain).join('\n')}</pre></section>` : null}
  </div>`;
}

const runTabs = (data) => [['overview', 'Overview'], ...(data.classes.length ? [['classes', 'Classes']] : []), ...(data.evaluation ? [['confusions', 'Confusions']] : []), ...(data.mistakes.length ? [['mistakes', 'Mistakes']] : [])];
