// The chart of one run, drawn from what the server told: loss, validation, learning rate; noise levels under the pointer.
import { before, fits, limits, merged, nearest, short, smoothed, ticks, whole } from './curve.mjs';
import { fileUrl, make } from './runs.mjs';
import { word } from './words.mjs';

const LEFT = 50, RIGHT = 10, SECOND = 46, TOP = 8, BOTTOM = 20; // CSS pixels around the plot; SECOND where the right has numbers too
const BLUE = '#3b82f6', ORANGE = '#f59e0b', GREEN = '#22c55e', GREY = '#94a3b8';
const STYLE = `
.trainyard-run { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 0; box-sizing: border-box; padding: 6px; overflow: hidden;
  border-radius: 6px; font: 12px/1.35 system-ui, sans-serif; color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); }
.trainyard-run .status { flex: none; max-height: 66px; overflow-y: auto; overflow-wrap: anywhere; scrollbar-width: thin; }
.trainyard-run .status.bad { color: var(--error-text, #f44); }
.trainyard-run .legend { flex: none; display: flex; flex-wrap: wrap; gap: 0 10px; color: var(--descrip-text, #999); }
.trainyard-run .legend span::before { content: ''; display: inline-block; width: 10px; height: 3px; margin-right: 4px; vertical-align: middle; border-radius: 2px; background: var(--mark); }
.trainyard-run .plot { position: relative; flex: 1 1 120px; min-height: 100px; }
.trainyard-run canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.trainyard-run .sample { flex: 1 1 150px; min-height: 110px; display: flex; align-items: center; justify-content: center; overflow: hidden; border-radius: 4px; cursor: zoom-in; }
.trainyard-run .sample img { max-width: 100%; max-height: 100%; object-fit: contain; }
.trainyard-run [hidden] { display: none; }
`;

/** What a measurement is of: a loss, of what was held out or of what is fixed, or a figure of another kind that is no loss. */
export const nameOf = entry => word(entry.figure ?? (entry.held_out ? 'validation' : `fixed ${entry.noun ?? 'pictures'}`));

export class Chart {
  /** says(): whether the node shows the text of its run itself, as it does until the page is loaded anew. */
  constructor(says = () => false) {
    this.says = says;
    this.run = null;
    this.pointer = null; // {x, y} in CSS pixels of the canvas, while it is over the plot
    this.status = make('div', { className: 'status' });
    this.status.setAttribute('role', 'status');
    this.canvas = make('canvas', { onpointermove: event => this.point({ x: event.offsetX, y: event.offsetY }), onpointerleave: () => this.point(null) });
    this.plot = make('div', { className: 'plot' }, this.canvas);
    this.legend = make('div', { className: 'legend' });
    this.image = make('img', { alt: word('samples'), draggable: false });
    this.sample = make('div', { className: 'sample', hidden: true, title: word('The last samples; click to open'), onclick: () => open(this.image.src, '_blank') }, this.image);
    this.root = make('div', { className: 'trainyard-run' }, make('style', { textContent: STYLE }), this.status, this.plot, this.legend, this.sample);
    for (const kind of ['pointerdown', 'mousedown', 'dblclick']) this.sample.addEventListener(kind, event => event.button === 1 || event.stopPropagation());
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.plot);
  }

  get height() { return this.run?.samples.length ? 440 : 230; }

  /** Everything the server knows. */
  show(told) {
    this.run = whole(told);
    this.refresh();
  }

  /** News of a run. False when they do not go on where the chart is. */
  hear(news) {
    if (!fits(this.run, news)) return false;
    this.run = merged(this.run, news);
    this.refresh();
    return true;
  }

  refresh() {
    const { run } = this, trouble = run.troubles.at(-1);
    this.status.textContent = trouble ? `${trouble.text} · ${run.text}` : run.text;
    this.status.title = this.status.textContent;
    this.status.hidden = !trouble && run.status === 'training' && this.says();
    this.status.classList.toggle('bad', run.status === 'failed');
    const last = run.validation.at(-1), gap = run.validation.some(one => one.training !== undefined);
    const lines = [[BLUE, word('loss')], ...(last ? [[ORANGE, this.apart ? word('{0} (right)', nameOf(last)) : nameOf(last)]] : []),
                   [GREEN, word(`trained ${last?.noun ?? 'pictures'}`), gap], [GREY, word('learning rate'), run.rates.length]];
    this.legend.replaceChildren(...lines.filter(([, , shown = true]) => shown).map(([colour, name]) => {
      const mark = make('span', { textContent: name });
      mark.style.setProperty('--mark', colour);
      return mark;
    }));
    Object.assign(this.root.dataset, { run: run.run, name: run.name, step: run.step, points: run.losses.length, measured: run.validation.length, status: run.status });
    this.picture();
    this.draw();
  }

  point(at) {
    this.pointer = at;
    this.picture();
    this.draw();
  }

  /** The samples of the step under the pointer, else the last ones. */
  picture() {
    const { samples, folder } = this.run;
    this.sample.hidden = !samples.length;
    if (!samples.length) return;
    const shown = (this.pointer && before(samples, this.step())) || samples.at(-1);
    const src = fileUrl(folder, shown.file);
    if (this.image.getAttribute('src') !== src) this.image.src = src;
  }

  remove() { this.sizes.disconnect(); }

  // -- drawing -----------------------------------------------------------------------------------------------------------

  get last() { return Math.max(this.run.step, this.run.losses.at(-1)?.[0] ?? 0, 1); }
  get apart() { return this.run.validation.some(one => one.figure); } // what is no loss has a scale of its own, on the right
  get end() { return this.width - (this.apart ? SECOND : RIGHT); }
  x(step) { return LEFT + (this.end - LEFT) * (step / this.last); }
  step() { return Math.min(this.last, Math.max(0, (this.pointer.x - LEFT) / (this.end - LEFT) * this.last)); }
  scale([low, high]) { return value => TOP + (this.tall - TOP - BOTTOM) * (1 - (Math.min(Math.max(value, low), high) - low) / (high - low)); }

  draw() {
    const { run, canvas } = this, box = [this.plot.clientWidth, this.plot.clientHeight];
    if (!run || !box[0] || !box[1]) return;
    const density = Math.max(1, window.devicePixelRatio) * 1.5; // sharp when the graph is zoomed in a little
    [canvas.width, canvas.height] = box.map(size => Math.round(size * density));
    [this.width, this.tall] = box;
    const pen = this.pen = canvas.getContext('2d');
    pen.setTransform(density, 0, 0, density, 0, 0);
    pen.clearRect(0, 0, ...box);
    pen.font = '10px system-ui, sans-serif';
    const style = getComputedStyle(this.root);
    this.ink = style.color;
    this.paper = style.backgroundColor;
    const smooth = this.smooth = smoothed(run.losses);
    const measured = name => run.validation.filter(one => Number.isFinite(one[name])).map(one => [one.step, one[name]]);
    const held = measured('loss'), trained = measured('training');
    const values = lines => lines.flat().map(([, value]) => value), seen = values([held, trained]);
    const range = limits(values([run.losses]), this.apart ? [] : seen);
    const beside = this.apart && seen.length ? limits([], seen) : range;
    const y = this.scale(range), second = this.scale(beside);
    Object.assign(this.root.dataset, { range: JSON.stringify(range), beside: JSON.stringify(beside) });
    this.grid(range, y);
    if (this.apart && seen.length) this.numbers(beside, second);
    this.rateLine();
    this.line(run.losses, y, BLUE, 1, 0.35);
    this.line(smooth, y, BLUE, 2);
    this.line(trained, second, GREEN, 1.5, 1, [4, 3]);
    this.line(held, second, ORANGE, 2, 1, [], true);
    if (this.pointer && run.losses.length) this.tell(held);
  }

  /** Round numbers for the height that there is. */
  heights([low, high]) { return ticks(low, high, Math.max(2, Math.floor(this.tall / 40))); }

  grid(range, y) {
    const { pen } = this;
    pen.fillStyle = pen.strokeStyle = this.ink;
    pen.lineWidth = 1;
    pen.textBaseline = 'middle';
    pen.textAlign = 'right';
    for (const value of this.heights(range)) {
      pen.globalAlpha = 0.15;
      pen.beginPath();
      pen.moveTo(LEFT, y(value));
      pen.lineTo(this.end, y(value));
      pen.stroke();
      pen.globalAlpha = 0.75;
      pen.fillText(short(value), LEFT - 6, y(value));
    }
    pen.textBaseline = 'alphabetic';
    for (const step of ticks(0, this.last, Math.max(2, Math.floor(this.width / 90))).filter(Number.isInteger)) {
      pen.textAlign = this.x(step) > this.width - 24 ? 'right' : 'center';
      pen.fillText(String(step), Math.min(this.x(step), this.width - 2), this.tall - 5);
    }
    pen.globalAlpha = 1;
  }

  /** The scale on the right. */
  numbers(range, y) {
    Object.assign(this.pen, { fillStyle: ORANGE, textBaseline: 'middle', textAlign: 'left' });
    for (const value of this.heights(range)) this.pen.fillText(short(value), this.end + 6, y(value));
    this.pen.textBaseline = 'alphabetic';
  }

  /** On a scale of its own from 0 to its highest, so that only its shape is told; the value is told under the pointer. */
  rateLine() {
    const top = Math.max(...this.run.rates.map(([, rate]) => rate), 0);
    if (top > 0) this.line(this.run.rates, rate => TOP + (this.tall - TOP - BOTTOM) * (1 - 0.94 * rate / top), GREY, 1, 0.8, [2, 2]);
  }

  line(points, y, colour, width, alpha = 1, dash = [], dots = false) {
    const { pen } = this;
    pen.strokeStyle = pen.fillStyle = colour;
    Object.assign(pen, { lineWidth: width, globalAlpha: alpha, lineJoin: 'round' });
    pen.setLineDash(dash);
    pen.beginPath();
    points.forEach(([step, value], i) => (i ? pen.lineTo(this.x(step), y(value)) : pen.moveTo(this.x(step), y(value))));
    pen.stroke();
    pen.setLineDash([]);
    if (dots || points.length === 1) for (const [step, value] of points) {
      pen.beginPath();
      pen.arc(this.x(step), y(value), 2.5, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  /** What lies under the pointer: numbers, and the noise levels of the nearest measurement beside those of the model alone. */
  tell(held) {
    const { pen, run } = this, step = Math.round(this.step());
    const [at, loss] = nearest(this.smooth, step), rate = before(run.rates, step) ?? run.rates[0];
    const entry = nearest(run.validation, step), trained = Number.isFinite(entry?.training) ? ` · ${word('trained')} ${short(entry.training)}` : '';
    const lines = [`${word('step {0}', at)} · ${word('loss')} ${short(loss)}${rate ? ` · lr ${short(rate[1])}` : ''}`,
                   ...(entry && held.length ? [`${word('step {0}', entry.step)} · ${nameOf(entry)} ${short(entry.loss)}${trained}`] : [])];
    pen.strokeStyle = this.ink;
    pen.globalAlpha = 0.4;
    pen.beginPath();
    pen.moveTo(this.x(at), TOP);
    pen.lineTo(this.x(at), this.tall - BOTTOM);
    pen.stroke();
    pen.globalAlpha = 1;
    const bars = entry?.bins?.some(Number.isFinite) ? 46 : 0;
    const wide = Math.max(...lines.map(line => pen.measureText(line).width), bars ? 130 : 0) + 12, high = lines.length * 13 + 8 + (bars && bars + 18);
    const left = this.x(at) + 8 + wide < this.width ? this.x(at) + 8 : Math.max(2, this.x(at) - 8 - wide), top = TOP + 2;
    pen.fillStyle = this.paper;
    pen.globalAlpha = 0.93;
    pen.beginPath();
    pen.roundRect(left, top, wide, high, 4);
    pen.fill();
    pen.globalAlpha = 0.3;
    pen.stroke();
    pen.globalAlpha = 1;
    Object.assign(pen, { fillStyle: this.ink, textAlign: 'left', textBaseline: 'middle' });
    lines.forEach((line, i) => pen.fillText(line, left + 6, top + 11 + 13 * i));
    if (bars) this.bars(entry, left + 6, top + 10 + 13 * lines.length, wide - 12, bars);
  }

  bars(entry, left, top, wide, high) {
    const { pen } = this, first = this.run.validation[0], most = Math.max(...entry.bins, ...(first.bins ?? [])), each = wide / entry.bins.length;
    const bar = (value, i, colour, alpha, inset) => {
      const tall = high * value / most;
      Object.assign(pen, { fillStyle: colour, globalAlpha: alpha });
      pen.fillRect(left + i * each + inset, top + high - tall, each - 1 - 2 * inset, tall);
    };
    if (first !== entry) first.bins.forEach((value, i) => bar(value, i, this.ink, 0.25, 0));
    entry.bins.forEach((value, i) => bar(value, i, ORANGE, 0.9, 1.5));
    Object.assign(pen, { fillStyle: this.ink, globalAlpha: 0.75, textAlign: 'left' });
    const ends = [entry.sigmas[0], entry.sigmas.at(-1)].map(sigma => Number(sigma.toPrecision(2)));
    pen.fillText(word('loss at noise {0} to {1}', ...ends), left, top + high + 8);
    pen.globalAlpha = 1;
  }
}
