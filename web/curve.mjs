// The arithmetic of the chart: what is kept of a run's news, smoothing, limits, ticks. Knows no page, so that Node tests it.

const MOST = 4000; // points of the loss curve; a longer one is halved

/** A run as it is shown, from everything the server knows. */
export const whole = told => ({ ...told, losses: told.losses ?? [], rates: told.rates ?? [], validation: told.validation ?? [],
                                samples: told.samples ?? [], troubles: told.troubles ?? [] });

/** Whether news go on where this run is; otherwise all of it has to be asked for. `before`: how many measurements, samples and troubles came before these. */
export function fits(run, news) {
  return !!run && run.run === news.run && (news.first === undefined || news.first <= run.step)
    && Object.entries(news.before ?? {}).every(([list, count]) => run[list].length >= count);
}

/** The run with the news in it. */
export function merged(run, news) {
  const later = (news.losses ?? []).filter(([step]) => step > (run.losses.at(-1)?.[0] ?? 0));
  const fresh = (old, more = []) => [...old, ...more.filter(one => !old.some(other => other.step === one.step))];
  return { ...run, step: news.step, steps: news.steps, status: news.status, text: news.text, losses: halved([...run.losses, ...later]),
           rates: halved([...run.rates, ...(news.rates ?? [])]), validation: fresh(run.validation, news.validation),
           samples: fresh(run.samples, news.samples), troubles: fresh(run.troubles, news.troubles) };
}

function halved(points) {
  if (points.length <= MOST) return points;
  return points.filter((_, i) => i % 2).map(([step, value], i) => [step, (value + points[2 * i][1]) / 2]);
}

/** Exponential moving average of [[step, value]] without the pull of its start; over a twentieth of what there is. */
export function smoothed(points) {
  const keep = 1 - 2 / (Math.max(2, points.length / 20) + 1);
  let total = 0, weight = 0;
  return points.map(([step, value]) => {
    total = keep * total + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return [step, total / weight];
  });
}

/** A range that shows the run and not its one worst step, and all of `few` values; never empty. */
export function limits(values, few = []) {
  const ordered = values.filter(Number.isFinite).sort((a, b) => a - b);
  const ends = ordered.length ? [ordered[Math.floor(0.005 * (ordered.length - 1))], ordered[Math.ceil(0.98 * (ordered.length - 1))]] : [];
  if (!ends.length && !few.length) return [0, 1];
  const low = Math.min(...ends, ...few), high = Math.max(...ends, ...few);
  const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low - pad, high + pad];
}

/** Round numbers between low and high. */
export function ticks(low, high, about) {
  const power = 10 ** Math.floor(Math.log10((high - low) / about));
  const step = [1, 2, 5, 10].map(k => k * power).find(size => (high - low) / size <= about);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

/** The last of these at or before a step; entries are {step} or [step, value]. */
export function before(entries, step) {
  const at = entry => entry.step ?? entry[0];
  let found = null;
  for (const entry of entries) {
    if (at(entry) > step) break;
    found = entry;
  }
  return found;
}

/** The one nearest to a step. */
export function nearest(entries, step) {
  const at = entry => entry.step ?? entry[0];
  return entries.reduce((best, entry) => (best === null || Math.abs(at(entry) - step) < Math.abs(at(best) - step) ? entry : best), null);
}

export const short = value => (value === null || value === undefined ? '-' : Math.abs(value) < 1e-12 ? '0' : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? String(Number(value.toPrecision(4))) : value.toExponential(1));
