// The data of the page, and the graphs as rows.

const data = JSON.parse(document.getElementById('data').textContent);
const SIDES = ['before', 'after'];
const other = side => (side === 'before' ? 'after' : 'before');
const signs = new Map(data.legend.map(entry => [entry.change, entry.sign]));
const streams = data.options.streams;
/** The node of a row after the change; of a removed one, before it. */
const nodeOf = row => row.after || row.before;
const isCall = row => nodeOf(row).op === 'call';

/** One graph: its rows with their nodes, and the users of each node. */
class Model {
  constructor(graph, layers, number) {
    Object.assign(this, {graph, layers, number});
    this.rows = graph.rows.map((row, place) => ({
      place,
      change: row.change,
      before: row.before === null ? null : graph.before[row.before],
      after: row.after === null ? null : graph.after[row.after],
    }));
    this.places = {before: new Map(), after: new Map()};
    this.users = {before: new Map(), after: new Map()};
    for (const row of this.rows) {
      for (const side of this.sides(row)) {
        this.places[side].set(row[side].name, row.place);
        for (const read of new Set(row[side].reads)) {
          if (!this.users[side].has(read)) this.users[side].set(read, []);
          this.users[side].get(read).push(row[side].name);
        }
      }
    }
    this.rejections = new Map(graph.rejections.map(rejection => [rejection.add, rejection]));
    this.expanded = graph.after.some(node => node.role === 'stream');
    this.spans = graph.chains.map(chain => this.span(chain)).filter(Boolean);
    this.texts = this.rows.map(row => this.text(row));
  }

  /** The sides on which a row has a node. */
  sides(row) {
    return SIDES.filter(side => row[side]);
  }

  row(side, name) {
    return this.rows[this.places[side].get(name)];
  }

  /** The rows of calls that belong to the sites of `paths`. */
  calls(paths) {
    return this.rows.filter(row => isCall(row) && this.sides(row).some(side => paths.has(row[side].site)));
  }

  /** The rows where the streams of a chain begin and end. */
  span(chain) {
    const own = this.calls(new Set(chain.sites.map(site => site.path)));
    if (!own.length) return null;
    let first = own[0].place;
    let last = own[own.length - 1].place;
    if (this.expanded) {
      const lifted = name => {
        const row = this.row('after', name);
        return row && row.after.op === 'call' && row.after.role === 'stream' && !row.after.site ? row : null;
      };
      for (let row = own[0]; row && row.after; row = row.after.reads.map(lifted).find(Boolean)) first = Math.min(first, row.place);
      const end = own[own.length - 1].after;
      for (const name of (end && this.users.after.get(end.name)) || []) {
        const row = this.row('after', name);
        if (row.after.role === 'stream' || row.change === 'lifted') last = Math.max(last, row.place);
      }
    }
    return {first, last};
  }

  /** "" off the trunk, else the part of a span that the row is. */
  lane(place) {
    const span = this.spans.find(({first, last}) => place >= first && place <= last);
    if (!span) return '';
    return place === span.first ? 'first' : place === span.last ? 'last' : 'middle';
  }

  isSite(row) {
    return this.sides(row).some(side => row[side].role === 'site') || (row.change === 'replaced' && Boolean(row.after.site));
  }

  /** The row of a site: its add, or the node that replaces it. */
  ofSite(path) {
    const own = this.calls(new Set([path]));
    return own.find(row => row.change === 'replaced') || own.find(row => this.isSite(row)) || own[0];
  }

  /** The row of a skipped add, and its side. */
  ofRejection({add}) {
    const side = SIDES.find(name => this.row(name, add));
    return [side && this.row(side, add), side];
  }

  /** The rejection of a row's add, if it is skipped. */
  rejection(row) {
    const side = SIDES.find(name => row[name] && row[name].role === 'skipped');
    return side && this.rejections.get(row[side].name);
  }

  text(row) {
    const words = [row.change];
    for (const side of this.sides(row)) {
      const node = row[side];
      words.push(node.text, node.value, node.module, node.kind, node.site, node.reason, node.source);
    }
    const rejection = this.rejection(row);
    return [...words, rejection ? rejection.message : ''].join('\n').toLowerCase();
  }
}

/** `file:line` with the last folder of its path. */
const brief = source => source.split('/').slice(-2).join('/');

const many = (count, thing) => `${count} ${thing}${count === 1 ? '' : 's'}`;

/** "view × 7, transpose × 4, …" */
function operations(rows) {
  const counts = new Map();
  for (const node of rows.map(nodeOf)) {
    const name = node.op === 'call' ? node.target.replace(/^.*\./, '') || node.name : node.op;
    counts.set(name, (counts.get(name) || 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const words = sorted.slice(0, 5).map(([name, count]) => (count > 1 ? `${name} × ${count}` : name));
  return words.join(', ') + (sorted.length > 5 ? ', …' : '');
}

/** An element whose `content` is a text, or a list of texts and elements. */
function element(tag, classes, content = [], attributes = {}) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...[].concat(content));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
