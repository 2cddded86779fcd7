// The two graphs: groups, folds and rows. Folded rows are built when they are first opened.

const LONG = 3; // longer runs of unchanged rows are folded

/** Rows below a heading. */
class Group {
  /** `label`: the elements of its name; `note`: a remark; `build(group)` fills it when it is first opened. */
  constructor(view, parent, depth, members, label, note, build) {
    Object.assign(this, {view, parent, depth, members, build, built: false});
    this.button = element('button', '', label, {'aria-expanded': 'false', type: 'button'});
    this.head = element('div', 'head', [
      view.gutter('before', members), element('div', 'label', this.button, {role: 'gridcell'}),
      view.gutter('after', members), element('div', 'note', note, {role: 'gridcell'}),
    ], {role: 'row'});
    this.head.group = this;
    this.body = element('div', 'body');
    this.body.hidden = true;
    this.box = element('div', `group depth${depth}`, [this.head, this.body], {role: 'rowgroup'});
    for (const place of members) view.owners[place] = this;
    view.groups.push(this);
    (parent ? parent.body : view.root).append(this.box);
  }

  get open() {
    return !this.body.hidden;
  }

  toggle(open) {
    if (open && !this.built) {
      this.built = true;
      this.build(this);
    }
    this.body.hidden = !open;
    this.button.setAttribute('aria-expanded', String(open));
  }
}

class RowsView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.owners = []; // the innermost group of every row
    this.elements = []; // the built rows
    this.groups = [];
    root.replaceChildren();
    root.style.setProperty('--n', model.expanded ? streams : 1);
    for (const layer of model.layers) this.layer(layer);
  }

  layer(layer) {
    const rows = layer.rows.map(place => this.model.rows[place]);
    const changed = this.changes(layer.rows);
    const name = layer.inputs ? 'inputs and parameters' : layer.path || 'the model itself';
    const label = [element('b', '', name)];
    if (layer.kind) label.push(element('i', '', layer.kind));
    if (layer.like) label.push(element('span', 'note', `as ${layer.like}`));
    const note = changed ? `${changed} of ${rows.length} changed` : `${rows.length} unchanged`;
    const group = new Group(this, null, 1, layer.rows, label, note, own => this.fill(own, layer));
    if (this.isOpen(group, layer)) group.toggle(true);
  }

  /** The modules of a layer, and the rows of the layer itself between them; unchanged ones folded. */
  fill(group, layer) {
    const parts = runs(layer.rows, place => this.child(layer, place));
    const quiet = !this.changes(layer.rows);
    for (const [shown, members] of runs(parts, ([, places]) => quiet || Boolean(this.changes(places)))) {
      const places = members.flatMap(([, inner]) => inner);
      if (shown || members.length === 1) {
        for (const part of members) this.part(group, layer, part);
      } else if (places.length <= LONG) {
        group.body.append(...places.map(place => this.row(place)));
      } else {
        const names = [...new Set(members.map(([name]) => name).filter(Boolean))];
        this.fold(group, places, names, fold => members.forEach(part => this.part(fold, layer, part)));
      }
    }
  }

  /** The first part of a row's module below its layer. */
  child(layer, place) {
    const {module, role, site} = nodeOf(this.model.rows[place]);
    if (role === 'stream' && !site) return ''; // where streams begin and end
    const prefix = layer.path ? `${layer.path}.` : '';
    return layer.inputs || !module.startsWith(prefix) ? '' : module.slice(prefix.length).split('.')[0];
  }

  /** One module of a layer as a group; rows of the layer itself as they are. */
  part(group, layer, [name, places]) {
    if (!name) {
      this.stretch(group, places);
      return;
    }
    const changed = this.changes(places);
    const path = layer.path ? `${layer.path}.${name}` : name;
    const rows = places.map(place => this.model.rows[place]);
    const own = rows.map(nodeOf).find(node => node.module === path);
    const label = [element('span', 'path', `.${name}`)];
    if (own) label.push(element('i', '', own.kind));
    if (!changed) label.push(element('span', 'note', `⋯ ${rows.length} unchanged`));
    const note = changed ? '' : operations(rows);
    const inner = new Group(this, group, 2, places, label, note, own => this.stretch(own, places, Boolean(changed)));
    if (changed || this.everything) inner.toggle(true);
  }

  /** Rows, with long unchanged runs folded. */
  stretch(group, places, folded = group.depth < 3) {
    for (const [same, members] of runs(places, place => this.model.rows[place].change === 'same')) {
      const show = inner => inner.body.append(...members.map(place => this.row(place)));
      if (same && folded && members.length > LONG) this.fold(group, members, [], show);
      else show(group);
    }
  }

  fold(group, places, names, build) {
    const also = names.length ? `, also in ${names.join(', ')}` : '';
    const label = element('span', 'note', `⋯ ${places.length} unchanged${also}`);
    const note = operations(places.map(place => this.model.rows[place]));
    const fold = new Group(this, group, 3, places, label, note, build);
    if (this.everything) fold.toggle(true);
  }

  changes(places) {
    return [...places].filter(place => this.model.rows[place].change !== 'same').length;
  }

  row(place) {
    const row = this.model.rows[place];
    const cells = SIDES.flatMap(side => [
      this.gutter(side, [place], true),
      row[side] ? this.cell(row, side) : element('div', 'cell none', '', {role: 'gridcell'}),
    ]);
    this.elements[place] = element('div', 'row', cells, {role: 'row', 'data-place': place, 'data-change': row.change});
    return this.elements[place];
  }

  cell(row, side) {
    const {name, op, role, text, value} = row[side];
    const isSite = role === 'site' && /same|marked/.test(row.change);
    const mark = role === 'skipped' ? '∅' : isSite ? '◆' : row.change === 'same' ? '' : signs.get(row.change);
    return element('div', 'cell', [
      element('span', 'sign', mark, {'aria-label': mark ? row.change : ''}),
      element('span', 'text', op === 'output' ? text : [element('b', '', name), op === 'call' ? text.slice(name.length) : '']),
      element('span', 'value', value),
    ], {role: 'gridcell', 'data-side': side, id: `cell-${side}-${row.place}`, 'aria-selected': 'false'});
  }

  gutter(side, places, single = false) {
    const gutter = element('div', 'gutter', '', {'aria-hidden': 'true'});
    const lanes = places.map(place => this.model.lane(place)).filter(Boolean);
    if (!lanes.length) return gutter;
    // A heading shows whether the trunk passes it or begins below it.
    const part = single ? lanes[0] : /middle|last/.test(this.model.lane(places[0])) ? 'middle' : 'below';
    const lane = element('span', `lane ${side} ${part}`);
    gutter.append(lane);
    if (single && this.model.isSite(this.model.rows[places[0]])) lane.classList.add('site');
    return gutter;
  }

  /** The outermost closed group that hides a row. */
  closed(place) {
    let found = null;
    for (let group = this.owners[place]; group; group = group.parent) if (!group.open) found = group;
    return found;
  }

  /** Open the groups that hide a row and return its element. */
  show(place) {
    for (let group = this.closed(place); group; group = this.closed(place)) group.toggle(true);
    return this.elements[place];
  }

  /** The visible element of a row: itself, or the heading of the outermost group that hides it. */
  stand(place) {
    const group = this.closed(place);
    return group ? group.head : this.elements[place];
  }

  toggleAll() {
    this.everything = !this.everything;
    // Opening a group adds others to the list.
    for (let place = 0; place < this.groups.length; place++) this.groups[place].toggle(this.everything || this.isOpen(this.groups[place]));
  }

  /** Whether a group is open at first: something changes in it, or nothing in the whole graph. */
  isOpen(group, layer = this.model.layers.find(candidate => candidate.rows === group.members)) {
    const changed = this.changes(group.members) || (layer && !this.changes(this.model.rows.keys()));
    return Boolean(changed) && !(layer && (layer.like || layer.inputs));
  }
}

/** Consecutive items with the same key together. */
function runs(items, key) {
  const found = [];
  for (const item of items) {
    const name = key(item);
    if (found.length && found[found.length - 1][0] === name) found[found.length - 1][1].push(item);
    else found.push([name, [item]]);
  }
  return found;
}
