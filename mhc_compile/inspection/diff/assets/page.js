// Selection, search, filter and keys.

const $ = id => document.getElementById(id);
const models = data.graphs.map((graph, number) => new Model(graph, data.layers[number], number));
const state = {model: null, view: null, arcs: null, selected: null, hits: [], hit: -1};

function openGraph(number) {
  state.model = models[number];
  state.selected = null;
  state.view = new RowsView(state.model, $('rows'));
  state.arcs = new Arcs(state.view);
  $('graph').value = String(number);
  fillSites($('sites'), state.model);
  fillDetails($('details'), state.model, null);
  search($('query').value, false);
}

/** Mark the row with its operands and users on both sides. `quiet` does not change the address. */
function select(row, side, quiet = false) {
  const root = $('rows');
  for (const marked of root.querySelectorAll('.operand, .user')) marked.classList.remove('operand', 'user');
  for (const cell of root.querySelectorAll('[aria-selected=true]')) cell.setAttribute('aria-selected', 'false');
  for (const button of $('sites').querySelectorAll('[aria-current]')) button.removeAttribute('aria-current');
  if (row && !row[side]) side = other(side);
  state.selected = row ? {row, side} : null;
  const related = {before: [], after: []};
  if (row) {
    const shown = state.view.show(row.place);
    for (const name of state.model.sides(row)) {
      $(`cell-${name}-${row.place}`).setAttribute('aria-selected', 'true');
      const relate = (names, kind) => {
        for (const place of new Set(names.map(other => state.model.places[name].get(other)))) {
          related[name].push([place, kind]);
          if (state.view.elements[place]) $(`cell-${name}-${place}`)?.classList.add(kind);
        }
      };
      relate(row[name].reads, 'operand');
      relate(state.model.users[name].get(row[name].name) || [], 'user');
    }
    root.setAttribute('aria-activedescendant', `cell-${side}-${row.place}`);
    reveal(shown);
    const site = row.after?.site || row.before?.site;
    markList(site ? `[data-site="${CSS.escape(site)}"]` : '');
    const place = state.model.graph.rejections.indexOf(state.model.rejection(row));
    if (place >= 0) markList(`[data-rejection="${place}"]`);
  } else {
    root.removeAttribute('aria-activedescendant');
  }
  fillDetails($('details'), state.model, row, side);
  state.arcs.draw(row ? row.place : null, related);
  if (!quiet) remember();
}

function markList(selector) {
  const button = selector && $('sites').querySelector(selector);
  if (!button) return;
  button.setAttribute('aria-current', 'true');
  reveal(button, $('sites'));
}

function reveal(shown, root = $('rows')) {
  const box = root.getBoundingClientRect();
  const own = shown.getBoundingClientRect();
  if (own.top < box.top + 30 || own.bottom > box.bottom - 30) root.scrollTop += own.top - box.top - box.height / 3;
}

function remember() {
  const {selected, model} = state;
  const node = selected && selected.row[selected.side];
  const hash = node ? `#g${model.number}:${selected.side}:${encodeURIComponent(node.name)}` : '#';
  try {
    history.replaceState(null, '', hash);
  } catch {
    location.hash = hash;
  }
}

function followAddress() {
  const found = /^#g(\d+):(before|after):(.+)$/.exec(location.hash);
  if (!found || !models[found[1]]) return;
  if (state.model !== models[found[1]]) openGraph(Number(found[1]));
  let name;
  try {
    name = decodeURIComponent(found[3]);
  } catch {
    return;
  }
  const row = state.model.row(found[2], name);
  if (row) select(row, found[2], true);
}

function search(text, jump = true) {
  if (!state.model) return;
  const query = text.trim().toLowerCase();
  for (const marked of $('rows').querySelectorAll('.hit')) marked.classList.remove('hit');
  // Calls first: parameters contain the names of all modules.
  const found = query ? state.model.rows.filter(row => state.model.texts[row.place].includes(query)) : [];
  state.hits = [...found.filter(isCall), ...found.filter(row => !isCall(row))];
  state.hit = -1;
  for (const row of state.hits) state.view.stand(row.place).classList.add('hit');
  for (const button of $('sites').querySelectorAll('li button')) {
    button.parentElement.classList.toggle('hit', Boolean(query) && `${button.textContent}\n${button.title}`.toLowerCase().includes(query));
  }
  if (state.hits.length && jump) nextHit(1);
  else countHits(query);
}

function nextHit(step) {
  if (!state.hits.length) return;
  state.hit = state.hit < 0 && step < 0 ? state.hits.length - 1 : (state.hit + step + state.hits.length) % state.hits.length;
  const row = state.hits[state.hit];
  select(row, row.after ? 'after' : 'before');
  for (const hit of state.hits) if (state.view.elements[hit.place]) state.view.elements[hit.place].classList.add('hit');
  countHits($('query').value.trim());
}

function countHits(query) {
  $('hits').textContent = !query ? '' : state.hits.length ? `${Math.max(0, state.hit) + 1} of ${state.hits.length}` : 'no hit';
}

function move(step) {
  const rows = [...$('rows').querySelectorAll('.row')].filter(row => row.offsetParent !== null); // the visible ones
  const at = state.selected ? rows.indexOf(state.view.elements[state.selected.row.place]) : step > 0 ? -1 : rows.length;
  const next = rows[Math.max(0, Math.min(rows.length - 1, at + step))];
  if (next) select(state.model.rows[next.dataset.place], state.selected?.side || 'after');
}

function moveToChange(step) {
  const shown = $('rows').classList;
  const order = state.model.layers.flatMap(layer => layer.rows).map(place => state.model.rows[place]);
  if (step < 0) order.reverse();
  const rest = order.slice(order.indexOf(state.selected?.row) + 1); // all, if no row is selected
  const next = rest.find(({change}) => change !== 'same' && !shown.contains(`no-${change}`));
  if (next) select(next, state.selected?.side || 'after');
}

function clear() {
  $('query').value = '';
  search('');
  select(null, 'after');
  $('rows').focus({preventScroll: true});
}

const keys = {
  ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
  ArrowLeft: () => turn('before'), h: () => turn('before'), ArrowRight: () => turn('after'), l: () => turn('after'),
  n: () => moveToChange(1), p: () => moveToChange(-1),
  e: () => { state.view.toggleAll(); redraw(); },
  '/': () => { $('query').focus(); $('query').select(); },
};

function turn(side) {
  if (state.selected?.row[side]) select(state.selected.row, side);
}

/** After a fold the arcs end elsewhere, and new rows may be hits or operands. */
function redraw() {
  search($('query').value, false);
  if (state.selected) {
    const {row, side} = state.selected;
    if (state.view.stand(row.place) === state.view.elements[row.place]) select(row, side, true);
    else state.arcs.draw(null);
  }
}

document.addEventListener('keydown', event => {
  if (!state.model) return;
  if (event.key === 'Escape') clear();
  const typing = event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName);
  if (typing || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

document.addEventListener('click', event => {
  if (!state.model) return;
  const {model} = state;
  const pick = (row, side) => row && select(row, side);
  const head = event.target.closest('.head');
  const cell = event.target.closest('.cell[data-side]');
  const {site, rejection, name, side, change} = event.target.closest('button')?.dataset || {};
  if (head) {
    head.group.toggle(!head.group.open);
    redraw();
  } else if (site !== undefined) pick(model.ofSite(site), 'after');
  else if (rejection !== undefined) pick(...model.ofRejection(model.graph.rejections[rejection]));
  else if (name !== undefined) pick(model.row(side, name), side);
  else if (change !== undefined) {
    const hidden = $('rows').classList.toggle(`no-${change}`);
    event.target.closest('button').setAttribute('aria-pressed', String(!hidden));
    redraw();
  } else if (cell) select(model.rows[cell.parentElement.dataset.place], cell.dataset.side);
});

$('search').addEventListener('submit', event => { event.preventDefault(); nextHit(1); });
$('query').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || !event.shiftKey) return;
  event.preventDefault();
  nextHit(-1);
});
$('query').addEventListener('input', event => search(event.target.value));
$('earlier').addEventListener('click', () => nextHit(-1));
$('graph').addEventListener('change', event => { openGraph(Number(event.target.value)); select(null, 'after'); });
window.addEventListener('hashchange', followAddress);
window.addEventListener('resize', () => { if (state.selected) select(state.selected.row, state.selected.side, true); });

fillHeader();
fillLegend($('legend'));
if (models.length > 1) {
  $('graph').hidden = false;
  $('graph').append(...models.map((model, number) => {
    const modules = model.graph.modules.map(path => path || 'the model itself');
    const more = modules.length > 1 ? ` and ${modules.length - 1} more` : '';
    return element('option', '', `graph ${number}: ${modules[0]}${more}`, {value: number});
  }));
}
if (models.length) {
  openGraph(0);
  followAddress();
} else {
  $('details').append(element('p', 'note', 'Dynamo made no graph of this model.'));
}
