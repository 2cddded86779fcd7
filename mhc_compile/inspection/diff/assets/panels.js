// The list of sites, the details of a node, and the legend.

function fillSites(nav, model) {
  nav.replaceChildren();
  model.graph.chains.forEach((chain, number) => {
    const facts = `${many(chain.sites.length, 'site')} · C = ${chain.width} · n = ${streams}`;
    nav.append(heading(`Chain ${number + 1}`, facts));
    const list = element('ul');
    for (const site of chain.sites) {
      const button = element('button', 'site', '', {type: 'button', 'data-site': site.path});
      button.append(dotted(site.path), element('small', '', [site.owner_kind, brief(site.source)].filter(Boolean).join(' · ')));
      button.title = site.source;
      const item = element('li');
      item.append(button);
      list.append(item);
    }
    nav.append(list);
    if (chain.lifted.length) nav.append(element('p', 'note', `${many(chain.lifted.length, 'trunk operation')} on all streams: ${[...new Set(chain.lifted)].join(', ')}`));
  });
  if (!model.graph.chains.length) nav.append(heading('No chain', 'nothing is rewritten in this graph'));
  if (!model.graph.rejections.length) return;
  nav.append(heading('Left alone', many(model.graph.rejections.length, 'addition')));
  const reasons = new Map();
  model.graph.rejections.forEach((rejection, place) => {
    if (!reasons.has(rejection.reason)) reasons.set(rejection.reason, []);
    reasons.get(rejection.reason).push([rejection, place]);
  });
  for (const [reason, members] of reasons) {
    nav.append(element('h3', '', `${reason} × ${members.length}`));
    const list = element('ul');
    let told = '';
    for (const [rejection, place] of members) {
      const button = element('button', 'rejection', '', {type: 'button', 'data-rejection': place});
      button.append(element('b', '', rejection.add), element('small', '', [rejection.module, brief(rejection.source)].filter(Boolean).join(' · ')));
      button.title = rejection.message;
      if (rejection.message !== told) button.append(element('span', 'sentence', rejection.message));
      told = rejection.message;
      const item = element('li');
      item.append(button);
      list.append(item);
    }
    nav.append(list);
  }
}

const many = (count, thing) => `${count} ${thing}${count === 1 ? '' : 's'}`;

/** A path that may break behind its dots. */
function dotted(path) {
  const made = element('b');
  path.split(/(?<=\.)/).forEach(part => made.append(part, element('wbr')));
  return made;
}

function heading(title, facts) {
  const made = element('h2', '', title);
  made.append(element('small', '', facts));
  return made;
}

const MARKS = [
  ['', 'Select a node to see its operation, operands (solid arcs) and users (dashed arcs); a site to see its rows.'],
  ['│', 'The line beside each graph is the residual trunk; where it has become streams there is one line for each.'],
  ['◆', 'An addition that becomes a hyper-connection; on the line, a circle before and a bar after.'],
  ['∅', 'An addition that is left alone; the list on the left says why.'],
];

function fillDetails(panel, model, row, side) {
  panel.replaceChildren();
  if (!row) {
    for (const [mark, text] of MARKS) {
      const line = element('p', 'note');
      line.append(element('b', '', mark), ` ${text}`);
      panel.append(line);
    }
    return;
  }
  const chosen = row[side] || row[other(side)];
  const legend = data.legend.find(entry => entry.change === row.change);
  const title = element('h2', '', chosen.op === 'output' ? 'output' : chosen.name);
  title.append(element('small', `tag ${row.change}`, `${legend.sign} ${legend.text}`.trim()));
  panel.append(title);
  const table = element('dl');
  const add = (name, ...values) => {
    const shown = values.filter(Boolean);
    if (!shown.length) return;
    const cell = element('dd');
    shown.forEach(value => cell.append(typeof value === 'string' ? element('span', '', value) : value));
    table.append(element('dt', '', name), cell);
  };
  const sides = SIDES.filter(name => row[name]);
  const alike = sides.length === 2 && row.before.text === row.after.text && row.before.value === row.after.value;
  for (const name of alike ? ['after'] : sides) {
    const node = row[name];
    const line = element('span', 'code');
    line.append(node.text, element('i', '', node.value && ` : ${node.value}`));
    add(alike ? 'both' : name, line);
  }
  add('module', chosen.module && `${chosen.module}  ${chosen.kind}`);
  add('site', chosen.site || (row.before && row.before.site) || '');
  for (const name of sides) {
    const rejection = model.rejection(row[name]);
    if (rejection) {
      add('left alone', `${rejection.reason}: ${rejection.message}`);
      break;
    }
  }
  add('source', chosen.source.split('/site-packages/').pop());
  for (const [label, names] of [['reads', chosen.reads], ['read by', model.users[row[side] ? side : other(side)].get(chosen.name) || []]]) {
    add(label, ...[...new Set(names)].map(name => {
      const link = element('button', 'link', name, {type: 'button', 'data-name': name, 'data-side': row[side] ? side : other(side)});
      return link;
    }));
  }
  panel.append(table);
}

function fillLegend(box) {
  for (const entry of data.legend) {
    const count = data.changes[entry.change];
    if (!count) continue;
    const button = element('button', `tag ${entry.change}`, '', {type: 'button', 'aria-pressed': 'true', 'data-change': entry.change});
    button.title = entry.text;
    if (entry.sign) button.append(element('b', '', entry.sign));
    button.append(`${count} `, element('span', '', entry.change === 'same' ? 'unchanged' : entry.change));
    box.append(button);
  }
}

function fillHeader() {
  document.getElementById('title').append(data.model, element('small', '', ` ${data.stage.before} → ${data.stage.after}`));
  document.getElementById('before').textContent = data.stage.before;
  document.getElementById('after').textContent = data.stage.after;
  const changed = Object.entries(data.options).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(data.defaults[name]));
  const line = [`streams=${streams}`, `mapping=${data.options.mapping}`];
  line.push(...changed.filter(([name]) => name !== 'streams' && name !== 'mapping').map(([name, value]) => `${name}=${typeof value === 'string' ? value : JSON.stringify(value)}`));
  const box = document.getElementById('options');
  box.textContent = line.join('  ');
  box.title = Object.entries(data.options).map(([name, value]) => `${name} = ${JSON.stringify(value)}`).join('\n');
}
