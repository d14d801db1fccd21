// What a node's last execution left on the page, wherever the node is: in a subgraph, in a workflow that comes back from another tab.
import { app } from '../../scripts/app.js';
import { learnt } from './words.mjs';

/** Calls act(...) after the node's own method of this name. */
export function after(node, name, act) {
  const before = node[name];
  node[name] = function (...args) {
    const result = before?.apply(this, args);
    act(...args);
    return result;
  };
}

/** Registers an extension: furnish(node) is called for each new node of these classes and gives show(output). */
export function showOutputs(name, classes, furnish) {
  const shows = new WeakMap();
  const recall = node => shows.get(node)?.(remembered(node));
  app.registerExtension({
    name,
    setup: learnt,
    nodeCreated(node) {
      if (!classes.includes(node.comfyClass)) return;
      const show = furnish(node);
      shows.set(node, output => output && show(output));
      after(node, 'onExecuted', shows.get(node));
    },
    loadedGraphNode: recall,
    onNodeOutputsUpdated: () => each(app.rootGraph ?? app.graph, recall),
  });
}

function remembered(node) {
  const nested = node.graph && node.graph !== app.rootGraph && node.graph.id;
  return app.nodeOutputs?.[nested ? `${node.graph.id}:${node.id}` : `${node.id}`];
}

function each(graph, act) {
  for (const node of graph?.nodes ?? []) {
    act(node);
    if (node.subgraph) each(node.subgraph, act);
  }
}
