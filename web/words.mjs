// The page's own words in ComfyUI's language. English is written where a word is used; locales/<language>/main.json has the others under
// "trainyard", each by its English.
import { app } from '../../scripts/app.js';

const known = {};
let asked = null;

/** Settles once the words are known; to be awaited in an extension's setup, before anything is shown. */
export const learnt = () => (asked ??= learn());

async function learn() {
  try {
    const language = app.extensionManager.setting.get('Comfy.Locale');
    if (language === 'en') return; // the server's texts are those of every pack: not asked for without need
    const answer = await app.api.fetchApi('/i18n');
    Object.assign(known, (await answer.json())[language]?.trainyard);
  } catch (error) {
    console.warn('Trainyard: the page stays English,', error);
  }
}

/** The text in the person's language; {0}, {1}, ... stand for the values. */
export const word = (text, ...values) => (known[text] ?? text).replace(/\{(\d)\}/g, (_, i) => values[i]);
