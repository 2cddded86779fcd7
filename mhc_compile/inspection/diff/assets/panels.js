// The list of sites, the details of a node, and the legend.

function fillSites(nav, model) {
  nav.replaceChildren();
  model.graph.chains.forEach((chain, number) => {
    const facts = `${many(chain.sites.length, 'site')} · C = ${chain.width} · n = ${streams}`;
    nav.append(heading(`Chain ${number + 1}`, facts), element('ul', '', chain.sites.map(site => {
      const content = [dotted(site.path), element('small', '', origin(site.owner_kind, site.source))];
      return element('li', '', element('button', 'site', content, {type: 'button', title: site.source, 'data-site': site.path}));
    })));
    const lifted = [...new Set(chain.lifted)].join(', ');
    if (lifted) nav.append(element('p', 'note', `${many(chain.lifted.length, 'trunk operation')} on all streams: ${lifted}`));
  });
  if (!model.graph.chains.length) nav.append(heading('No chain', 'nothing is rewritten in this graph'));
  if (!model.graph.rejections.length) return;
  nav.append(heading('Skipped', many(model.graph.rejections.length, 'addition')));
  const reasons = new Map();
  model.graph.rejections.forEach((rejection, place) => {
    if (!reasons.has(rejection.reason)) reasons.set(rejection.reason, []);
    reasons.get(rejection.reason).push([rejection, place]);
  });
  for (const [reason, members] of reasons) {
    let last = '';
    nav.append(element('h3', '', `${reason} × ${members.length}`), element('ul', '', members.map(([rejection, place]) => {
      const {add, module, source, message} = rejection;
      const content = [element('b', '', add), element('small', '', origin(module, source))];
      if (message !== last) content.push(element('span', 'sentence', message));
      last = message;
      return element('li', '', element('button', 'rejection', content, {type: 'button', title: message, 'data-rejection': place}));
    })));
  }
}

const origin = (owner, source) => [owner, brief(source)].filter(Boolean).join(' · ');

/** A path that may break after its dots. */
const dotted = path => element('b', '', path.split(/(?<=\.)/).flatMap(part => [part, element('wbr')]));

const heading = (title, facts) => element('h2', '', [title, element('small', '', facts)]);

const MARKS = [
  ['', 'Select a node to see its operation, operands (solid arcs) and users (dashed arcs); a site to see its rows.'],
  ['│', 'The line next to each graph is the residual trunk; after the expansion there is one line for each stream.'],
  ['◆', 'An addition that becomes a hyper-connection; on the line, a circle before and a bar after.'],
  ['∅', 'An addition that is skipped; the list on the left says why.'],
];

function fillDetails(panel, model, row, side) {
  panel.replaceChildren();
  if (!row) {
    panel.append(...MARKS.map(([mark, text]) => element('p', 'note', [element('b', '', mark), ` ${text}`])));
    return;
  }
  const shown = row[side] ? side : other(side);
  const chosen = row[shown];
  const legend = data.legend.find(entry => entry.change === row.change);
  const tag = element('small', `tag ${row.change}`, `${legend.sign} ${legend.text}`.trim());
  const table = element('dl');
  const add = (name, ...values) => {
    const known = values.filter(Boolean).map(value => (typeof value === 'string' ? element('span', '', value) : value));
    if (known.length) table.append(element('dt', '', name), element('dd', '', known));
  };
  const sides = model.sides(row);
  const alike = sides.length === 2 && row.before.text === row.after.text && row.before.value === row.after.value;
  for (const name of alike ? ['after'] : sides) {
    const {text, value} = row[name];
    add(alike ? 'both' : name, element('span', 'code', [text, element('i', '', value && ` : ${value}`)]));
  }
  add('module', chosen.module && `${chosen.module}  ${chosen.kind}`);
  add('site', chosen.site || row.before?.site);
  const rejection = model.rejection(row);
  add('skipped', rejection && `${rejection.reason}: ${rejection.message}`);
  add('source', chosen.source.split('/site-packages/').pop());
  for (const [label, names] of [['reads', chosen.reads], ['read by', model.users[shown].get(chosen.name) || []]]) {
    add(label, ...[...new Set(names)].map(name =>
      element('button', 'link', name, {type: 'button', 'data-name': name, 'data-side': shown})));
  }
  panel.append(element('h2', '', [chosen.op === 'output' ? 'output' : chosen.name, tag]), table);
}

function fillLegend(box) {
  for (const {change, sign, text} of data.legend) {
    const count = data.changes[change];
    if (!count) continue;
    const word = element('span', '', change === 'same' ? 'unchanged' : change);
    const content = [...(sign ? [element('b', '', sign)] : []), `${count} `, word];
    box.append(element('button', `tag ${change}`, content, {type: 'button', title: text, 'aria-pressed': 'true', 'data-change': change}));
  }
}

function fillHeader() {
  document.getElementById('title').append(data.model, element('small', '', ` ${data.stage.before} → ${data.stage.after}`));
  for (const side of SIDES) document.getElementById(side).textContent = data.stage[side];
  const spelled = ([name, value]) => `${name}=${typeof value === 'string' ? value : JSON.stringify(value)}`;
  const options = Object.entries(data.options);
  const always = ['streams', 'mapping'];
  const changed = ([name, value]) => !always.includes(name) && JSON.stringify(value) !== JSON.stringify(data.defaults[name]);
  const box = document.getElementById('options');
  box.textContent = [...always.map(name => [name, data.options[name]]), ...options.filter(changed)].map(spelled).join('  ');
  box.title = options.map(([name, value]) => `${name} = ${JSON.stringify(value)}`).join('\n');
}
