// Puts the caption grid into the node Edit Captions by Hand. The widget `edits` is the only state; pictures come with each execution.
import { app } from '../../scripts/app.js';
import { Edits } from './caption_edits.mjs';
import { Grid } from './caption_grid.mjs';

const NODE = 'TrainyardEditCaptionsByHand';
const SIZE = [760, 700], LEAST_HEIGHT = 320;
const SETTLED_MS = 600; // after the last change the workflow is told, so that it is kept through a reload

const thumbnail = thumb => app.api.apiURL(`/view?${new URLSearchParams(thumb)}`);

function told() {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(() => app.api.dispatchEvent(new CustomEvent('graphChanged')), SETTLED_MS);
  };
}

/** Out of sight in both renderers; a page without this script shows it as the text that it is. */
function hide(widget) {
  widget.hidden = true;
  widget.options.hidden = true;
}

/** What the page remembers of the node's last execution, also inside a subgraph. */
function remembered(node) {
  const outputs = app.nodeOutputs ?? {};
  return outputs[node.graph && node.graph !== app.rootGraph && node.graph.id ? `${node.graph.id}:${node.id}` : `${node.id}`];
}

function after(node, name, act) {
  const before = node[name];
  node[name] = function (...args) {
    const result = before?.apply(this, args);
    act(...args);
    return result;
  };
}

function furnish(node) {
  const kept = node.widgets?.find(widget => widget.name === 'edits');
  if (!kept) return;
  const settled = told();
  const edits = new Edits(() => kept.value, text => { kept.value = text; kept.callback?.(text); settled(); });
  const grid = new Grid(edits, thumbnail);
  hide(kept);
  node.addDOMWidget('captions', 'TRAINYARD_CAPTIONS', grid.root, { serialize: false, hideOnZoom: false, getMinHeight: () => LEAST_HEIGHT });
  node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);
  node.trainyardShow = output => {
    const cards = output?.trainyard_captions;
    if (!cards || cards === grid.list) return;
    grid.show(cards, output.trainyard_about?.[0] ?? '');
  };
  after(node, 'onExecuted', node.trainyardShow);
  after(node, 'onConfigure', () => { if (edits.sync()) grid.refresh(); });
  after(node, 'onRemoved', () => grid.remove());
}

/** Every node of this kind, in subgraphs too. */
function* all(graph) {
  for (const node of graph?.nodes ?? []) {
    if (node.comfyClass === NODE) yield node;
    if (node.subgraph) yield* all(node.subgraph);
  }
}

app.registerExtension({
  name: 'Trainyard.Captions',
  nodeCreated(node) {
    if (node.comfyClass === NODE) furnish(node);
  },
  loadedGraphNode(node) {
    if (node.comfyClass === NODE) node.trainyardShow?.(remembered(node));
  },
  onNodeOutputsUpdated() { // another tab's workflow came back, or a result from history
    for (const node of all(app.rootGraph ?? app.graph)) node.trainyardShow?.(remembered(node));
  },
});
