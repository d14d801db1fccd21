// The sidebar "Training Runs": what lies in the runs folder and what is at work, from the server's files and memory.
import { app } from '../../scripts/app.js';
import { nameOf } from './chart.mjs';
import { short } from './curve.mjs';
import { ask, fileUrl, make, onRun } from './runs.mjs';
import { learnt, word } from './words.mjs';

const STYLE = `
.trainyard-runs { min-height: 100%; font: 13px/1.4 system-ui, sans-serif; color: var(--input-text, #ddd); }
.trainyard-runs header { position: sticky; top: 0; z-index: 1; background: var(--comfy-menu-bg, #353535); display: flex; align-items: center; gap: 8px; padding: 10px 12px; font-weight: 600; border-bottom: 1px solid var(--border-color, #4e4e4e); }
.trainyard-runs header span { flex: 1 1 0; }
.trainyard-runs .list { padding: 10px 12px; display: flex; flex-direction: column; gap: 10px; }
.trainyard-runs .card { flex: none; display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 2px 10px; padding: 8px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px;
  background: var(--comfy-input-bg, #222); }
.trainyard-runs .card > * { grid-column: 1; }
.trainyard-runs .card img { grid-column: 2; grid-row: 1 / span 4; width: 92px; height: 68px; object-fit: cover; border-radius: 4px; cursor: zoom-in; }
.trainyard-runs .name { font-weight: 600; overflow-wrap: anywhere; }
.trainyard-runs .dim { color: var(--descrip-text, #999); overflow-wrap: anywhere; }
.trainyard-runs .bar { grid-column: 1 / -1; height: 4px; margin: 4px 0; border-radius: 2px; background: var(--border-color, #4e4e4e); overflow: hidden; }
.trainyard-runs .bar div { height: 100%; background: #3b82f6; }
.trainyard-runs .acts { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 6px; }
.trainyard-runs button { font: inherit; padding: 2px 8px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; cursor: pointer; color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #353535); }
.trainyard-runs button:hover { border-color: var(--input-text, #ddd); }
.trainyard-runs button:focus-visible { outline: 2px solid var(--p-primary-color, #60a5fa); }
.trainyard-runs .training { color: #3b82f6; }
.trainyard-runs .failed { color: var(--error-text, #f44); }
.trainyard-runs .empty { margin: 24px 8px; text-align: center; color: var(--descrip-text, #999); }
`;
const QUIET_MS = 2000; // at work the list is asked for at most this often

const size = bytes => (bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`);
const say = (severity, summary, detail) => app.extensionManager.toast.add({ severity, summary, detail, life: 5000 });

// -- what can be done with a run ------------------------------------------------------------------------------------------

async function openGraph(run) {
  const { workflow } = await ask(`/${encodeURIComponent(run.folder)}/graph`);
  if (!workflow) throw new Error(word('This run was queued without its workflow, so there is none to open.'));
  await app.loadGraphData(workflow, true, true, run.name);
}

async function resume(run) {
  await openGraph(run);
  await app.queuePrompt(0, 1);
}

const stop = run => app.api.interrupt(run.prompt || null);

async function useLora(run) {
  const graph = app.canvas.graph ?? app.graph, node = LiteGraph.createNode('TrainyardLoadLora');
  const [x, y, width, height] = app.canvas.visible_area;
  node.pos = [x + width / 2 - 150, y + height / 2 - 50];
  graph.add(node);
  const widget = node.widgets.find(one => one.name === 'file');
  if (Array.isArray(widget.options.values) && !widget.options.values.includes(run.file)) widget.options.values.push(run.file);
  widget.value = run.file;
  app.canvas.selectNode?.(node);
  await navigator.clipboard?.writeText(run.file).catch(() => {});
  say('success', word('Load LoRA File added'), word('{0} (copied)', run.file));
}

async function remove(run) {
  const message = word('Delete the run {0} with its {1}: its LoRAs, its samples and the state it could be continued from?', run.folder, size(run.bytes));
  const sure = await (app.extensionManager.dialog?.confirm?.({ title: word('Delete this run?'), message, type: 'delete', itemList: [] }) ?? confirm(message));
  if (!sure) return;
  const { freed } = await ask(`/${encodeURIComponent(run.folder)}/delete`, { method: 'POST' });
  say('success', word('Deleted'), word('{0}: {1} are free again', run.folder, size(freed)));
}

// -- the tab --------------------------------------------------------------------------------------------------------------

class Tab {
  constructor(element) {
    this.list = make('div', { className: 'list' });
    const again = make('button', { textContent: word('Refresh'), title: word('Look into the runs folder again'), onclick: () => this.load() });
    this.root = make('div', { className: 'trainyard-runs' }, make('style', { textContent: STYLE }),
                     make('header', {}, make('span', { textContent: word('Training Runs') }), again), this.list);
    Object.assign(element.style, { height: '100%', overflowY: 'auto' });
    element.replaceChildren(this.root);
    this.cards = new Map(); // what a run told -> its card, which stays as it is while nothing changes
    this.load();
  }

  async load() {
    try {
      const runs = await ask();
      this.cards = new Map(runs.map(run => [JSON.stringify(run), this.cards.get(JSON.stringify(run)) ?? this.card(run)]));
      this.list.replaceChildren(...(runs.length ? this.cards.values() : [make('div', { className: 'empty', textContent: word('No runs yet. A Train node makes one.') })]));
    } catch (error) {
      this.list.replaceChildren(make('div', { className: 'empty failed', textContent: String(error.message ?? error) }));
    }
  }

  /** Soon, and not more often than can be read. */
  soon() {
    this.timer ??= setTimeout(() => { this.timer = null; if (this.root.isConnected) this.load(); }, QUIET_MS);
  }

  card(run) {
    const dim = text => make('div', { className: 'dim', textContent: text });
    const loss = run.loss === null ? '' : ` · ${word('loss')} ${short(run.loss)}`;
    const seen = Number.isFinite(run.validation?.loss) ? ` · ${nameOf(run.validation)} ${short(run.validation.loss)}` : '';
    const card = make('div', { className: 'card' }, make('div', { className: 'name', textContent: run.name }));
    if (run.sample) {
      const url = fileUrl(run.folder, run.sample);
      card.append(make('img', { src: url, alt: word('samples'), title: word('The last samples; click to open'), onclick: () => open(url, '_blank') }));
    }
    const done = make('div', {}, make('span', { className: run.status === 'training' ? 'training' : '', textContent: word(run.status) }), ` · ${word('step {0} of {1}', run.step, run.steps)}`);
    const bar = make('div', { className: 'bar' }, make('div'));
    bar.firstChild.style.width = `${Math.min(100, 100 * run.step / Math.max(1, run.steps))}%`;
    const when = run.changed ? ` · ${new Date(1000 * run.changed).toLocaleString()}` : '';
    if (run.status === 'damaged') done.replaceChildren(make('span', { className: 'failed', textContent: word('damaged') }), ` · ${run.text}`);
    card.append(done, dim(`${[run.model, run.bytes ? size(run.bytes) : ''].filter(Boolean).join(' · ')}${when}`), dim(`${loss}${seen}`.slice(3)), bar, this.acts(run));
    card.dataset.folder = run.folder;
    return card;
  }

  acts(run) {
    const act = (label, title, work) => make('button', { textContent: word(label), title: word(title), onclick: () => this.does(work, run) });
    const busy = run.status === 'training';
    return make('div', { className: 'acts' }, ...[
      busy && act('Stop', 'Cancel the prompt; the last complete step is saved', stop),
      !busy && run.status === 'stopped' && act('Resume', 'Open the workflow and press Run: it goes on where it was', resume),
      run.bytes && act('Open workflow', 'Open the workflow that trained it', openGraph),
      run.file && act('Use LoRA', 'Add a Load LoRA File node with its newest file, and copy the name', useLora),
      !busy && act('Delete', 'Delete the run with all its files; asks first', remove),
    ].filter(Boolean));
  }

  async does(work, run) {
    try {
      await work(run);
    } catch (error) {
      say('error', run.name, String(error.message ?? error));
    }
    this.soon();
  }
}

let tab = null;
app.registerExtension({
  name: 'Trainyard.Runs',
  async setup() {
    await learnt();
    app.extensionManager.registerSidebarTab({
      id: 'trainyard-runs', icon: 'pi pi-chart-line', title: word('Training Runs'), tooltip: `${word('Training Runs')} (Trainyard)`, type: 'custom',
      render: element => { tab = new Tab(element); },
    });
    onRun(() => tab?.root.isConnected && tab.soon());
  },
});
