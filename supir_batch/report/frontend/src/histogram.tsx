/** How the images are spread over one score. */

import type { Score } from "./data";
import { EVERYTHING, type Filter, said } from "./selection";

const BARS = 24;
const WIDTH = 320;
const HEIGHT = 96;

interface Spread {
  least: number;
  most: number;
  median: number;
  counts: number[];
  measured: number;
}

const spreads = new WeakMap<Score, Spread>();

export function spread(score: Score): Spread {
  const found = spreads.get(score) ?? measure(score.values);
  spreads.set(score, found);
  return found;
}

function measure(values: (number | null)[]): Spread {
  const known = Float64Array.from(values.filter((value) => value !== null)).sort();
  const least = known[0] ?? 0;
  const most = known[known.length - 1] ?? 0;
  const counts = new Array<number>(least === most ? 1 : BARS).fill(0);
  for (const value of known) counts[bar(value, least, most)]!++;
  return { least, most, median: known[Math.floor((known.length - 1) / 2)] ?? 0, counts, measured: known.length };
}

function bar(value: number, least: number, most: number): number {
  return least === most ? 0 : Math.min(BARS - 1, Math.floor(((value - least) / (most - least)) * BARS));
}

export function Histogram({ score, show }: { score: Score; show: (filter: Filter) => void }) {
  const { least, most, median, counts, measured } = spread(score);
  const top = Math.max(...counts);
  const step = WIDTH / counts.length;
  const worst: Filter = { ...EVERYTHING, sort: score.column, descending: score.better === "low" };
  const look = (at: number) => {
    const width = (most - least) / counts.length;
    const range = { column: score.column, least: least + at * width, most: at === counts.length - 1 ? most : least + (at + 1) * width };
    show({ ...worst, range });
  };
  return (
    <figure class="plot">
      <figcaption>
        <h3>{score.label}</h3>
        {score.meaning && <p class="soft">{score.meaning}</p>}
      </figcaption>
      <svg
        viewBox={`0 0 ${WIDTH} ${HEIGHT + 2}`}
        role="img"
        aria-label={`${score.label} of ${measured} images: from ${said(least)} to ${said(most)}, median ${said(median)}`}
      >
        {counts.map((count, at) => {
          const height = count ? Math.max(3, (count / top) * HEIGHT) : 0;
          return (
            <g key={at} class="bar-of" onClick={count ? () => look(at) : undefined}>
              <title>{`${count} ${count === 1 ? "image" : "images"}`}</title>
              <rect class="room" x={at * step} y={0} width={step} height={HEIGHT} />
              <rect class="mark" x={at * step + 1} y={HEIGHT - height} width={Math.max(1, Math.min(step - 2, 40))} height={height} />
            </g>
          );
        })}
        <line x1={0} x2={WIDTH} y1={HEIGHT + 0.5} y2={HEIGHT + 0.5} />
      </svg>
      <p class="ends">
        {least === most ? (
          <span>{said(least)} everywhere</span>
        ) : (
          <>
            <span>{said(least)}</span>
            <span>median {said(median)}</span>
            <span>{said(most)}</span>
          </>
        )}
      </p>
      <p>
        <button type="button" class="link" onClick={() => show(worst)}>
          {score.better === null ? "Lowest first" : "Worst first"}
        </button>
      </p>
    </figure>
  );
}
