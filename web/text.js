// Shows the text that a node gives out, line by line as it was written: warnings (! ...) and changes (- before, + after) in colour.
import { showOutputs } from './outputs.mjs';

const NODES = ['TrainyardEditCaptions', 'TrainyardCaptionReport'];
const mixed = colour => `color-mix(in srgb, ${colour} 60%, var(--input-text, #ddd))`; // readable on light and dark alike
const COLOURS = { '+': mixed('#22c55e'), '-': 'var(--descrip-text, #999)', '!': mixed('#f59e0b') };
const LOOK = `width: 100%; height: 100%; margin: 0; padding: 6px 8px; box-sizing: border-box; overflow: auto; overscroll-behavior: contain; border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.45 ui-monospace, monospace; user-select: text; cursor: text;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222);`;

function line(text) {
  const element = document.createElement('span');
  element.textContent = `${text}\n`;
  if (text[1] === ' ' && COLOURS[text[0]]) element.style.color = COLOURS[text[0]];
  return element;
}

showOutputs('Trainyard.Text', NODES, node => {
  const pane = document.createElement('pre');
  pane.className = 'trainyard-text';
  pane.style.cssText = LOOK;
  pane.tabIndex = 0;
  for (const kind of ['pointerdown', 'mousedown', 'dblclick']) pane.addEventListener(kind, event => event.button === 1 || event.stopPropagation());
  const widget = node.addDOMWidget('text', 'TRAINYARD_TEXT', pane, { serialize: false, hideOnZoom: false, getMinHeight: () => 110 });
  widget.serialize = false;
  node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 420)]);
  return output => output.text && pane.replaceChildren(...[output.text].flat().join('\n').split('\n').map(line));
});
