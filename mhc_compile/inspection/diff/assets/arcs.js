// Lines in the gutters from the selected node to its operands and users.

class Arcs {
  constructor(view) {
    this.view = view;
    this.drawings = {};
    for (const side of SIDES) {
      const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
      svg.setAttribute('class', `arcs ${side}`);
      svg.setAttribute('aria-hidden', 'true');
      view.root.append(svg);
      this.drawings[side] = svg;
    }
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
        const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
        path.setAttribute('class', kind);
        const turn = to > from ? 6 : -6;
        path.setAttribute('d', `M${right} ${from} Q${bulge} ${from} ${bulge} ${from + turn} V${to - turn} Q${bulge} ${to} ${right} ${to}`);
        svg.append(path);
      }
    }
  }
}
