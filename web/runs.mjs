// What the page knows of runs: the server's events and routes, and where a node is whose run they tell of. Nothing is kept here.
import { app } from '../../scripts/app.js';
import { word } from './words.mjs';

export const EVENT = 'trainyard.run'; // nodes/page/live.py has the same

/** Calls act(news) for every event of a run. */
export const onRun = act => app.api.addEventListener(EVENT, event => act(event.detail));

/** The parsed answer of a route below /trainyard/runs. Throws an Error with the server's words. */
export async function ask(path = '', options = {}) {
  const answer = await app.api.fetchApi(`/trainyard/runs${path}`, options);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error ?? word('The server answered {0}.', answer.status));
  return body;
}

export const rootGraph = () => app.rootGraph ?? app.graph;

/** The graph's id, which the server gets with each prompt and gives back with each event. */
export const workflowId = () => String(rootGraph()?.id ?? '');

/** The node of an execution id such as "3:2" (node 2 in the subgraph of node 3), or null. */
export function nodeOf(executionId) {
  let graph = rootGraph(), node = null;
  for (const id of String(executionId).split(':')) {
    node = graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** Calls act(node, execution id) for every node, also inside subgraphs. */
export function eachNode(act, graph = rootGraph(), path = '') {
  for (const node of graph?.nodes ?? []) {
    act(node, `${path}${node.id}`);
    if (node.subgraph) eachNode(act, node.subgraph, `${path}${node.id}:`);
  }
}

/** Where a file of a run lies, such as samples/step000100.jpg. */
export function fileUrl(folder, file) {
  const parts = file.split('/'), filename = parts.pop();
  return app.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: ['loras', 'trainyard', folder, ...parts].join('/'), type: 'output' })}`);
}

/** An element; keys that begin with `on` are listeners. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}
