// The caption grid: pictures with captions to type into. Draws what `Edits` holds and keeps no state of its own but the view.
import { matches, pattern, replacement } from './caption_edits.mjs';
import { make } from './runs.mjs';
import { word } from './words.mjs';

const PAGE = 100; // cards are made as they are scrolled to

const STYLE = `
.trainyard-captions { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%; min-height: 0; box-sizing: border-box; padding: 6px;
  overflow: hidden; font: 12px/1.4 system-ui, sans-serif; color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #353535); border-radius: 6px; }
.trainyard-captions * { box-sizing: border-box; }
.trainyard-captions .bar { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; flex: none; }
.trainyard-captions .grow { flex: 1 1 110px; min-width: 0; }
.trainyard-captions input:not([type=checkbox]), .trainyard-captions textarea, .trainyard-captions select { font: inherit; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; padding: 3px 6px; }
.trainyard-captions input[type=button] { cursor: pointer; }
.trainyard-captions input[type=button]:hover:enabled { border-color: var(--input-text, #ddd); }
.trainyard-captions input[type=button]:disabled { opacity: .45; cursor: default; }
.trainyard-captions :is(input, textarea, select):focus-visible { outline: 2px solid var(--p-primary-color, #60a5fa); outline-offset: -1px; }
.trainyard-captions label { display: flex; gap: 3px; align-items: center; white-space: nowrap; cursor: pointer; }
.trainyard-captions label input { margin: 0; accent-color: var(--p-primary-color, #60a5fa); }
.trainyard-captions .line { flex: none; min-height: 17px; color: var(--descrip-text, #999); overflow-wrap: anywhere; }
.trainyard-captions .line.bad { color: var(--error-text, #ff4444); }
.trainyard-captions .cards { flex: 1 1 0; min-height: 0; overflow-y: auto; overscroll-behavior: contain; display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); align-content: start; scrollbar-width: thin; }
.trainyard-captions .card { content-visibility: auto; contain-intrinsic-size: auto 290px; display: flex; flex-direction: column; gap: 4px; padding: 5px;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 5px; background: var(--comfy-input-bg, #222); }
.trainyard-captions .card.changed { border-color: var(--p-primary-color, #60a5fa); box-shadow: inset 3px 0 0 var(--p-primary-color, #60a5fa); }
.trainyard-captions .card.bare textarea { border-style: dashed; }
.trainyard-captions .picture { height: 150px; flex: none; display: flex; align-items: center; justify-content: center; border-radius: 3px;
  background: var(--comfy-menu-bg, #353535); overflow: hidden; color: var(--descrip-text, #999); text-align: center; }
.trainyard-captions .picture img { max-width: 100%; max-height: 100%; object-fit: contain; }
.trainyard-captions .picture span { padding: 6px; max-height: 100%; overflow: auto; }
.trainyard-captions .head { display: flex; gap: 4px; align-items: center; min-width: 0; height: 24px; flex: none; }
.trainyard-captions .head span { flex: 1 1 0; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--descrip-text, #999); }
.trainyard-captions .card:not(.changed) .head input { visibility: hidden; }
.trainyard-captions .card textarea { width: 100%; height: 84px; flex: none; resize: vertical; }
.trainyard-captions .empty { margin: auto; padding: 24px; text-align: center; color: var(--descrip-text, #999); }
.trainyard-captions .end { grid-column: 1 / -1; height: 1px; }
.trainyard-captions [hidden] { display: none; }
`;

/** An <input type=button>: with a <button> focused the page would take Ctrl+Z as undo of the whole graph. */
const button = (value, title, onclick) => make('input', { type: 'button', value, title, onclick });

export class Grid {
  /** edits: the state. url(thumb): where a thumbnail lies. */
  constructor(edits, url) {
    Object.assign(this, { edits, url, list: null, shown: [], made: new Map(), about: '' });
    this.build();
    this.show(null);
  }

  build() {
    const refilter = () => this.filter();
    this.search = make('input', { type: 'search', className: 'grow', placeholder: word('Filter: words of a name or caption, -word'), title: 'Ctrl+F', oninput: refilter });
    this.kind = make('select', { title: word('Which pictures are shown'), onchange: refilter }, ...['all', 'edited', 'without caption'].map(name => new Option(word(name), name)));
    this.find = make('input', { type: 'text', className: 'grow', placeholder: word('Find'), oninput: () => this.tell() });
    this.with = make('input', { type: 'text', className: 'grow', placeholder: word('Replace with') });
    this.cased = make('input', { type: 'checkbox', onchange: () => this.tell() });
    this.regex = make('input', { type: 'checkbox', onchange: () => this.tell() });
    this.replaceButton = button(word('Replace'), word('Replace in all captions that are shown'), () => this.replace());
    this.undoButton = button(word('Undo'), 'Ctrl+Z', () => this.undo());
    this.redoButton = button(word('Redo'), 'Ctrl+Shift+Z', () => this.redo());
    this.revertButton = button(word('Revert all'), word('Take back every edit of this dataset'), () => this.revert(this.list ?? []));
    this.line = make('div', { className: 'line' });
    this.line.setAttribute('role', 'status');
    this.cards = make('div', { className: 'cards' });
    this.end = make('div', { className: 'end' });
    this.root = make('div', { className: 'trainyard-captions' },
      make('style', { textContent: STYLE }),
      make('div', { className: 'bar' }, this.search, this.kind, this.undoButton, this.redoButton, this.revertButton),
      make('div', { className: 'bar' }, this.find, this.with, make('label', { title: word('Distinguish capital letters') }, this.cased, 'Aa'),
           make('label', { title: word('Regular expression; $1 is its first group') }, this.regex, '.*'), this.replaceButton),
      this.line, this.cards);
    this.listen();
  }

  /** Keeps keys and pointer of the grid from the canvas beneath. */
  listen() {
    this.root.addEventListener('keydown', event => this.key(event));
    for (const kind of ['pointerdown', 'mousedown', 'dblclick', 'contextmenu'])
      this.root.addEventListener(kind, event => event.button === 1 || event.stopPropagation());
    this.root.addEventListener('focusin', () => this.edits.sync() && this.refresh());
    this.watcher = new IntersectionObserver(seen => seen.some(entry => entry.isIntersecting) && this.more(), { root: this.cards, rootMargin: '600px' });
    this.watcher.observe(this.end);
  }

  key(event) {
    const command = event.ctrlKey || event.metaKey, letter = event.key.toLowerCase();
    if (command && event.key === 'Enter') return; // ComfyUI's Run
    event.stopPropagation();
    if (event.isComposing) return;
    if (command && letter === 'z') this.take(event, () => (event.shiftKey ? this.redo() : this.undo()));
    else if (command && letter === 'y') this.take(event, () => this.redo());
    else if (command && letter === 'f') this.take(event, () => this.search.select());
    else if (event.target.tagName === 'TEXTAREA' && event.key === 'Enter' && !event.shiftKey) this.take(event, () => this.next(event.target));
    else if (event.target.tagName === 'TEXTAREA' && event.key === 'Escape') this.take(event, () => this.search.focus());
    else if (event.key === 'Enter' && [this.find, this.with].includes(event.target)) this.take(event, () => this.replace());
  }

  take(event, act) {
    event.preventDefault();
    act();
  }

  next(area) {
    const all = [...this.cards.querySelectorAll('textarea')];
    const after = all[all.indexOf(area) + 1];
    after?.focus();
    after?.closest('.card').scrollIntoView({ block: 'nearest' });
  }

  // -- what is shown -----------------------------------------------------------------------------------------------------

  /** The pictures of an execution; null before the first. */
  show(list, about = '') {
    Object.assign(this, { list, about, made: new Map() });
    this.edits.sync();
    this.filter();
  }

  filter() {
    const wanted = { all: () => true, edited: card => this.edits.changed(card), 'without caption': card => !this.edits.of(card).some(c => c.trim()) }[this.kind.value];
    this.shown = (this.list ?? []).filter(card => wanted(card) && matches(card, this.edits.of(card), this.search.value));
    this.cards.replaceChildren(this.end);
    this.cards.scrollTop = 0;
    if (!this.shown.length) this.cards.prepend(make('div', { className: 'empty', textContent: word(this.list ? 'No picture matches the filter.' : 'Run to see the pictures.') }));
    this.more();
    this.refresh();
  }

  more() {
    const there = this.cards.querySelectorAll('.card').length;
    const fresh = this.shown.slice(there, there + PAGE).map(card => this.made.get(card) ?? this.card(card));
    this.end.before(...fresh);
    if (fresh.length && there + PAGE < this.shown.length) { // still in sight after this page: be told again
      this.watcher.unobserve(this.end);
      this.watcher.observe(this.end);
    }
  }

  card(card) {
    const element = make('div', { className: 'card' });
    const picture = card.thumb ? this.picture(card) : make('span', { textContent: card.why || word('no picture') });
    const revert = button(word('Revert'), word('Back to: {0}', card.captions.join(' | ') || word('(no caption)')), () => this.revert([card]));
    revert.tabIndex = -1;
    element.append(make('div', { className: 'picture', title: card.name }, picture),
                   make('div', { className: 'head' }, make('span', { textContent: card.name, title: card.name }), revert));
    const areas = this.edits.of(card).map((_, i) => make('textarea', {
      spellcheck: true, placeholder: word('no caption'), ariaLabel: word('Caption of {0}', card.name), oninput: () => this.typed(card, i) }));
    element.append(...areas);
    this.made.set(card, element);
    this.update(card, element);
    return element;
  }

  /** The small picture, or why it cannot be made. */
  picture(card) {
    const src = this.url(card.thumb), image = make('img', { loading: 'lazy', decoding: 'async', src, alt: card.name, draggable: false });
    image.onerror = async () => {
      const answer = await fetch(src).catch(() => null), why = answer && !answer.ok ? await answer.text() : '';
      image.replaceWith(make('span', { textContent: why || word('no picture') }));
    };
    return image;
  }

  /** Brings one card in line with the state. */
  update(card, element) {
    const captions = this.edits.of(card), areas = element.querySelectorAll('textarea');
    areas.forEach((area, i) => { if (area.value !== (captions[i] ?? '')) area.value = captions[i] ?? ''; });
    element.classList.toggle('changed', this.edits.changed(card));
    element.classList.toggle('bare', !captions.some(c => c.trim()));
  }

  refresh() {
    for (const [card, element] of this.made) this.update(card, element);
    this.tell();
  }

  /** The line of counts, and which buttons can be pressed. */
  tell() {
    const { list, shown, edits } = this, changed = (list ?? []).filter(card => edits.changed(card)).length;
    let text = '';
    if (list) {
      const count = shown.length === list.length ? word('{0} pictures', list.length) : word('{0} of {1} pictures', shown.length, list.length);
      text = `${count} · ${word('{0} edited', changed)}`;
    }
    const kept = Object.keys(edits.values).length;
    if (!list && kept) text = word('{0} edited captions are kept in the workflow', kept);
    let bad = edits.error && word('The kept edits are no JSON ({0}). Take them back with Revert all.', edits.error);
    if (list && this.find.value && !bad) {
      try {
        const found = pattern(this.find.value, this.options());
        text += ` · ${word('found in {0}', shown.filter(card => edits.of(card).some(c => c.search(found) >= 0)).length)}`;
      } catch (error) {
        bad = word('The pattern is wrong: {0}', error.message);
      }
    }
    const more = this.about.split('\n').slice(1).join(' · ');
    this.line.textContent = bad || [text, more].filter(Boolean).join(' · ');
    this.line.title = this.about;
    this.line.classList.toggle('bad', !!bad);
    this.undoButton.disabled = !edits.past.length;
    this.redoButton.disabled = !edits.future.length;
    this.revertButton.disabled = !changed && !edits.error;
    this.replaceButton.disabled = !list || !this.find.value || !!bad;
  }

  // -- what is done ------------------------------------------------------------------------------------------------------

  options() {
    return { regex: this.regex.checked, cased: this.cased.checked };
  }

  typed(card, i) {
    const areas = [...this.made.get(card).querySelectorAll('textarea')];
    this.edits.set([[card, areas.map(area => area.value)]], `${card.id}/${i}`);
    for (const [other, element] of this.made) if (other.id === card.id) this.update(other, element);
    this.tell();
  }

  replace() {
    if (this.replaceButton.disabled) return;
    const count = this.edits.replace(this.shown, pattern(this.find.value, this.options()), replacement(this.with.value, this.regex.checked));
    this.refresh();
    this.line.textContent = `${word('Replaced in {0} of {1} pictures', count, this.shown.length)} · ${this.line.textContent}`;
  }

  revert(cards) {
    if (this.edits.error) this.edits.clear();
    else this.edits.revert(cards.filter(card => this.edits.changed(card)));
    this.refresh();
  }

  undo() { if (this.edits.undo()) this.refresh(); }
  redo() { if (this.edits.redo()) this.refresh(); }

  remove() { this.watcher.disconnect(); }
}
