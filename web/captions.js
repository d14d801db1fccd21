// Puts the caption grid into the node Edit Captions by Hand. The widget `edits` is the only state; pictures come with each execution.
import { app } from '../../scripts/app.js';
import { Edits } from './caption_edits.mjs';
import { Grid } from './caption_grid.mjs';
import { after, showOutputs } from './outputs.mjs';

const SIZE = [760, 700], LEAST_HEIGHT = 320;
const SETTLED_MS = 600; // after the last change the workflow takes note, so that it is kept through a reload and the graph's own undo

/** Where a thumbnail lies; one without a place is made when it is asked for. */
const thumbnail = thumb => app.api.apiURL(thumb.type ? `/view?${new URLSearchParams(thumb)}` : `/trainyard/thumbnails/${encodeURIComponent(thumb.filename)}`);

function settling() {
  let timer;
  const note = () => { app.canvas.emitBeforeChange(); app.canvas.emitAfterChange(); };
  return () => {
    clearTimeout(timer);
    timer = setTimeout(note, SETTLED_MS);
  };
}

/** Out of sight in both renderers; a page without this script shows it as the text that it is. */
function hide(widget) {
  widget.hidden = true;
  widget.options.hidden = true;
}

showOutputs('Trainyard.Captions', ['TrainyardEditCaptionsByHand'], node => {
  const kept = node.widgets.find(widget => widget.name === 'edits'), settled = settling();
  const edits = new Edits(() => kept.value, text => { kept.value = text; kept.callback?.(text); settled(); });
  const grid = new Grid(edits, thumbnail);
  hide(kept);
  const drawn = node.addDOMWidget('captions', 'TRAINYARD_CAPTIONS', grid.root, { serialize: false, hideOnZoom: false, getMinHeight: () => LEAST_HEIGHT });
  drawn.serialize = false; // the option keeps it out of prompts, this out of workflows
  node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);
  after(node, 'onConfigure', () => { if (edits.sync()) grid.refresh(); });
  after(node, 'onRemoved', () => grid.remove());
  return output => {
    const cards = output.trainyard_captions;
    if (cards && cards !== grid.list) grid.show(cards, output.trainyard_about?.[0]);
  };
});

// Nodes 2.0 hands the wheel to the canvas before an element that has no focus sees it. Over our panes it scrolls; with Ctrl it zooms.
addEventListener('wheel', event => {
  if (event.target.closest?.('.trainyard-captions, .trainyard-text') && !event.ctrlKey && !event.metaKey) event.stopImmediatePropagation();
}, { capture: true, passive: true });
