/** Which images the gallery shows, and in which order. */

import type { Report } from "./data";
import type { Decisions } from "./decisions";

export interface Filter {
  text: string;
  /** `""`: any; else restored, failed, open, accept, reject, redo, noted, or `flag:<column>`. */
  state: string;
  /** Value by column of a facet. */
  facets: Record<string, string>;
  /** Bounds of a score, both included. */
  range: { column: string; least: number; most: number } | null;
  sort: string;
  descending: boolean;
}

export const EVERYTHING: Filter = { text: "", state: "", facets: {}, range: null, sort: "name", descending: false };

export const STATES: [string, string][] = [
  ["", "All"],
  ["open", "Not yet decided"],
  ["accept", "Accepted"],
  ["reject", "Rejected"],
  ["redo", "To redo"],
  ["noted", "With a note"],
  ["restored", "Restored"],
  ["failed", "Failed"],
];

const collator = new Intl.Collator("en", { numeric: true });
const places = new WeakMap<Report, Uint32Array>();

/** The place of each image in the order of names. */
function byName(report: Report): Uint32Array {
  let found = places.get(report);
  if (!found) {
    const order = Uint32Array.from(report.id.keys()).sort((a, b) =>
      collator.compare(report.name_of[a]!, report.name_of[b]!),
    );
    found = new Uint32Array(order.length);
    order.forEach((row, place) => (found![row] = place));
    places.set(report, found);
  }
  return found;
}

/** The numbers of the images that `filter` leaves, in its order. */
export function select(report: Report, filter: Filter, decisions: Decisions): number[] {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  const score = report.scores.find((one) => one.column === filter.range?.column);
  const facets = report.facets.flatMap((facet) => {
    const wanted = filter.facets[facet.column];
    return wanted ? [{ codes: facet.codes, code: facet.values.indexOf(wanted) }] : [];
  });
  const flagged = filter.state.startsWith("flag:")
    ? new Set(report.flags.find((flag) => `flag:${flag.column}` === filter.state)?.rows)
    : null;
  const rows: number[] = [];
  for (let row = 0; row < report.id.length; row++) {
    if (words.length) {
      const text = `${report.name_of[row]}\n${report.id[row]}`.toLowerCase();
      if (!words.every((word) => text.includes(word))) continue;
    }
    if (flagged ? !flagged.has(row) : filter.state && !isIn(report, row, filter.state, decisions)) continue;
    if (!facets.every(({ codes, code }) => codes[row] === code)) continue;
    if (score && filter.range) {
      const value = score.values[row];
      if (value === null || value === undefined || value < filter.range.least || value > filter.range.most) continue;
    }
    rows.push(row);
  }
  return sorted(report, rows, filter);
}

function isIn(report: Report, row: number, state: string, decisions: Decisions): boolean {
  const done = report.done[row] === 1;
  if (state === "restored") return done;
  if (state === "failed") return !done;
  const decision = decisions.of(report.fingerprint[row]!);
  if (state === "noted") return Boolean(decision?.note);
  if (state === "open") return done && (!decision || decision.decision === "undecided");
  return decision?.decision === state;
}

function sorted(report: Report, rows: number[], filter: Filter): number[] {
  const place = byName(report);
  const values = report.scores.find((one) => one.column === filter.sort)?.values;
  const size = filter.sort === "size" ? (row: number) => report.width[row]! * report.height[row]! : null;
  const key = values ? (row: number) => values[row] ?? null : size;
  const way = filter.descending ? -1 : 1;
  return rows.sort((a, b) => {
    if (!key) return way * (place[a]! - place[b]!);
    const [one, other] = [key(a), key(b)];
    if (one === other) return place[a]! - place[b]!;
    if (one === null) return 1; // what was not measured comes last either way
    if (other === null) return -1;
    return way * (one - other);
  });
}

/** A number as people read it. */
export function said(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toLocaleString("en", { maximumSignificantDigits: size < 1 ? 3 : 4 });
}
