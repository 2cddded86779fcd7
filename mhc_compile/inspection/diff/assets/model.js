// The data, and the questions that the page asks it.

const data = JSON.parse(document.getElementById('data').textContent);
const SIDES = ['before', 'after'];
const other = side => (side === 'before' ? 'after' : 'before');
const signs = new Map(data.legend.map(entry => [entry.change, entry.sign]));
const streams = data.options.streams;

/** One graph: its rows with their nodes, and who reads whom. */
class Model {
  constructor(graph, layers, number) {
    this.graph = graph;
    this.layers = layers;
    this.number = number;
    this.rows = graph.rows.map((row, place) => ({
      place,
      change: row.change,
      before: row.before === null ? null : graph.before[row.before],
      after: row.after === null ? null : graph.after[row.after],
    }));
    this.places = {before: new Map(), after: new Map()};
    this.users = {before: new Map(), after: new Map()};
    for (const row of this.rows) {
      for (const side of SIDES) {
        const node = row[side];
        if (!node) continue;
        this.places[side].set(node.name, row.place);
        for (const read of new Set(node.reads)) {
          if (!this.users[side].has(read)) this.users[side].set(read, []);
          this.users[side].get(read).push(node.name);
        }
      }
    }
    this.sentences = new Map(graph.rejections.map(rejection => [rejection.add, rejection]));
    this.expanded = graph.after.some(node => node.role === 'stream');
    this.spans = graph.chains.map(chain => this.span(chain)).filter(Boolean);
    this.texts = this.rows.map(row => this.text(row));
  }

  row(side, name) {
    return this.rows[this.places[side].get(name)];
  }

  /** Where the streams of a chain begin and end, and where its sites are. */
  span(chain) {
    const paths = new Set(chain.sites.map(site => site.path));
    const own = this.rows.filter(row => this.isCall(row) && SIDES.some(side => row[side] && paths.has(row[side].site)));
    if (!own.length) return null;
    let first = own[0].place;
    let last = own[own.length - 1].place;
    if (this.expanded) {
      const lifted = name => {
        const row = this.row('after', name);
        return row && row.after.op === 'call' && row.after.role === 'stream' && !row.after.site ? row : null;
      };
      for (let row = own[0]; row && row.after; row = row.after.reads.map(lifted).find(Boolean)) first = Math.min(first, row.place);
      const readers = own[own.length - 1].after ? this.users.after.get(own[own.length - 1].after.name) || [] : [];
      for (const name of readers) {
        const row = this.row('after', name);
        if (row.after.role === 'stream' || row.change === 'lifted') last = Math.max(last, row.place);
      }
    }
    return {first, last};
  }

  isCall(row) {
    return (row.after || row.before).op === 'call';
  }

  /** "" off the trunk, else which part of a span the row is. */
  lane(place) {
    for (const span of this.spans) {
      if (place === span.first) return 'first';
      if (place === span.last) return 'last';
      if (place > span.first && place < span.last) return 'middle';
    }
    return '';
  }

  isSite(row) {
    return Boolean(
      (row.before && row.before.role === 'site') || (row.after && row.after.role === 'site') ||
      (row.change === 'replaced' && row.after.site));
  }

  /** The row that stands for a site: its addition, or what took its place. */
  ofSite(path) {
    const own = this.rows.filter(row => this.isCall(row) && SIDES.some(side => row[side] && row[side].site === path));
    return own.find(row => row.change === 'replaced') || own.find(row => this.isSite(row)) || own[0];
  }

  ofRejection(rejection) {
    for (const side of SIDES) {
      const row = this.row(side, rejection.add);
      if (row) return {row, side};
    }
    return null;
  }

  rejection(node) {
    return node && node.role === 'left-alone' ? this.sentences.get(node.name) || null : null;
  }

  text(row) {
    const words = [row.change];
    for (const side of SIDES) {
      const node = row[side];
      if (!node) continue;
      words.push(node.text, node.value, node.module, node.kind, node.site, node.reason, node.source);
      const rejection = this.rejection(node);
      if (rejection) words.push(rejection.message);
    }
    return words.join('\n').toLowerCase();
  }
}

/** `file:line` with as much of the path as tells files apart. */
const brief = source => source.split('/').slice(-2).join('/');

/** "view × 7, transpose × 4, …" */
function operations(rows) {
  const counts = new Map();
  for (const row of rows) {
    const node = row.after || row.before;
    const name = node.op === 'call' ? node.target.replace(/^.*\./, '') || node.name : node.op;
    counts.set(name, (counts.get(name) || 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const words = sorted.slice(0, 5).map(([name, count]) => (count > 1 ? `${name} × ${count}` : name));
  return words.join(', ') + (sorted.length > 5 ? ', …' : '');
}

function element(tag, classes, text, attributes = {}) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
