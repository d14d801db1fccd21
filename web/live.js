// A live chart in every Train node: drawn from the server's memory, so that it is whole again after a reload, in another tab, in a subgraph.
import { app } from '../../scripts/app.js';
import { Chart } from './chart.mjs';
import { after } from './outputs.mjs';
import { ask, eachNode, nodeOf, onRun, workflowId } from './runs.mjs';
import { learnt } from './words.mjs';

const trains = node => node?.comfyClass?.startsWith('TrainyardTrain');
const charts = new WeakMap(); // node -> its Chart

/** The node's chart, put into it when there is something to show first. */
function chartOf(node) {
  if (!charts.has(node)) charts.set(node, furnished(node));
  return charts.get(node);
}

function furnished(node) {
  const chart = new Chart(() => node.widgets.some(widget => widget.name.includes('text-preview')));
  const widget = node.addDOMWidget('run', 'TRAINYARD_RUN', chart.root, { serialize: false, hideOnZoom: false, getMinHeight: () => chart.height });
  widget.serialize = false; // the option keeps it out of prompts, this out of workflows
  after(node, 'onRemoved', () => chart.remove());
  return chart;
}

/** Room for the chart and, later, for its samples; a node that is large enough keeps its size. */
function settle(node, chart) {
  if (chart.room === chart.height) return;
  chart.room = chart.height;
  const least = node.computeSize();
  node.setSize([Math.max(node.size[0], 340), Math.max(node.size[1], least[1])]);
  app.canvas?.setDirty(true, true);
}

async function recall(node, id) {
  try {
    const told = await ask(`/${encodeURIComponent(id)}?${new URLSearchParams({ workflow: workflowId() })}`);
    if (!told.run) return;
    const chart = chartOf(node);
    chart.show(told);
    settle(node, chart);
  } catch (error) {
    console.warn('Trainyard: no chart,', error);
  }
}

app.registerExtension({
  name: 'Trainyard.Live',
  async setup() {
    await learnt();
    onRun(news => {
      const node = nodeOf(news.node);
      if (!trains(node) || (news.workflow && news.workflow !== workflowId())) return;
      const chart = charts.get(node);
      if (chart?.hear(news)) settle(node, chart);
      else if (chart?.run?.run === news.run || news.losses?.length || news.validation?.length) recall(node, news.node);
    });
  },
  afterConfigureGraph: () => eachNode((node, id) => trains(node) && recall(node, id)),
});
