// Lines in the gutters from the selected node to its operands and users.

function svgElement(tag, attributes) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

class Arcs {
  constructor(view) {
    this.view = view;
    const drawing = side => [side, svgElement('svg', {class: `arcs ${side}`, 'aria-hidden': 'true'})];
    this.drawings = Object.fromEntries(SIDES.map(drawing));
    view.root.append(...Object.values(this.drawings));
  }

  /** The distance of an element from the top of the drawing. */
  middle(element) {
    const box = element.getBoundingClientRect();
    return (box.top + box.bottom) / 2 - this.drawings.before.getBoundingClientRect().top;
  }

  /** `related`: {before: [[place, kind]], after: …} for the row at `place`. */
  draw(place, related) {
    for (const side of SIDES) {
      const svg = this.drawings[side];
      svg.replaceChildren();
      const own = place === null ? null : this.view.stand(place);
      const cell = own && own.querySelectorAll('.gutter')[side === 'before' ? 0 : 1];
      if (!cell) continue;
      const right = cell.offsetLeft + cell.offsetWidth - 21;
      const from = this.middle(own);
      for (const [target, kind] of related[side]) {
        const stand = this.view.stand(target);
        if (stand === own) continue;
        const to = this.middle(stand);
        const bulge = right - Math.min(24, 6 + Math.sqrt(Math.abs(to - from)));
        const turn = to > from ? 6 : -6;
        const d = `M${right} ${from} Q${bulge} ${from} ${bulge} ${from + turn} V${to - turn} Q${bulge} ${to} ${right} ${to}`;
        svg.append(svgElement('path', {class: kind, d}));
      }
    }
  }
}
