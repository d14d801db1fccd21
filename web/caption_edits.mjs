// What a person has written into the caption grid, and the way back. Knows nothing of the page.
//
// The state is one text, JSON {picture id: caption, or a list where a picture has alternatives}, which lives in a widget of the node
// and so in the workflow. What equals the picture's own captions is not in it.

const STEPS = 300; // of undo
const PAUSE_MS = 1200; // typing without a longer pause is one step

export class Edits {
  /** read() gives the text and write(text) takes it; now() is a clock in milliseconds. */
  constructor(read, write, now = () => performance.now()) {
    Object.assign(this, { read, write, now, past: [], future: [], last: null });
    this.sync();
  }

  /** Takes over a text that came from elsewhere: a loaded workflow, the graph's own undo. True when there was one. */
  sync() {
    const text = this.read() || '';
    if (text === this.text) return false;
    Object.assign(this, { text, error: null, values: {}, past: [], future: [], last: null });
    try {
      const values = text.trim() ? JSON.parse(text) : {};
      if (values === null || typeof values !== 'object' || Array.isArray(values)) throw new Error('it is no object');
      this.values = values;
    } catch (error) {
      this.error = error.message;
    }
    return true;
  }

  /** The captions that count for a picture: at least one, maybe empty. */
  of(card) {
    const value = Object.hasOwn(this.values, card.id) ? this.values[card.id] : card.captions;
    const captions = Array.isArray(value) ? value : [value];
    return captions.length ? captions : [''];
  }

  changed(card) {
    return Object.hasOwn(this.values, card.id) && !same(this.of(card), card.captions);
  }

  /** Captions for some pictures, as one step of undo. Steps of the same key in quick succession become one. */
  set(pairs, key = null) {
    if (this.error) return; // what cannot be read is not overwritten
    const values = { ...this.values };
    for (const [card, captions] of pairs) {
      if (same(captions, card.captions)) delete values[card.id];
      else values[card.id] = captions.length === 1 ? captions[0] : captions;
    }
    const typing = key !== null && this.last?.key === key && this.now() - this.last.at < PAUSE_MS;
    if (!typing) this.past = [...this.past, this.values].slice(-STEPS);
    this.last = { key, at: this.now() };
    this.future = [];
    this.put(values);
  }

  revert(cards) {
    this.set(cards.map(card => [card, card.captions]));
  }

  /** Replaces in these pictures' captions, as one step. Gives how many pictures changed. */
  replace(cards, pattern, text) {
    const pairs = cards.map(card => [card, this.of(card).map(caption => caption.replace(pattern, text))]);
    const touched = pairs.filter(([card, captions]) => !same(captions, this.of(card)));
    if (touched.length) this.set(touched);
    return touched.length;
  }

  undo() { return this.step(this.past, this.future); }
  redo() { return this.step(this.future, this.past); }

  step(from, to) {
    if (!from.length) return false;
    to.push(this.values);
    this.last = null;
    this.put(from.pop());
    return true;
  }

  clear() {
    this.error = null;
    this.put({});
  }

  put(values) {
    this.values = values;
    this.text = Object.keys(values).length ? JSON.stringify(values, null, 1) : '';
    this.write(this.text);
  }
}

/** Equal as captions: an absent one is an empty one. */
export function same(a, b) {
  const [one, other] = [a, b].map(captions => captions.map(c => c.trim()).filter(Boolean));
  return one.length === other.length && one.every((caption, i) => caption === other[i]);
}

/** What the find field looks for. Throws when a regular expression is wrong. */
export function pattern(find, { regex = false, cased = false } = {}) {
  return new RegExp(regex ? find : find.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'), cased ? 'gu' : 'giu');
}

/** What is put in its place: `$1` means a group in a regular expression only. */
export const replacement = (text, regex) => (regex ? text : text.replaceAll('$', '$$$$'));

/** Whether a picture is shown: every word is in its name or captions, and no -word is. */
export function matches(card, captions, query) {
  const text = [card.name, ...captions].join('\n').toLowerCase();
  return query.toLowerCase().split(/\s+/).filter(Boolean).every(
    word => (word.length > 1 && word.startsWith('-') ? !text.includes(word.slice(1)) : text.includes(word)));
}
