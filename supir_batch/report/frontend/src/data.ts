/** What the report says, as its data files hand it over. Everything in it is text of strangers: it is only ever set as text. */

export interface Score {
  column: string;
  label: string;
  meaning: string;
  better: "low" | "high" | null;
  values: (number | null)[];
}

export interface Flag {
  column: string;
  label: string;
  rows: number[];
}

export interface Facet {
  column: string;
  label: string;
  values: string[];
  codes: number[];
}

export interface Run {
  run: string;
  started_at: string | null;
  seconds: number;
  done: number;
  failed: number;
  megapixels: number;
}

export interface Failure {
  kind: string;
  stage: string;
  message: string;
  retryable: boolean;
}

export type Verdict = "accept" | "reject" | "redo" | "undecided";

/** A decision about one output. The settings are for `redo`. */
export interface Decision {
  id: string;
  fingerprint: string;
  decision: Verdict;
  prompt?: string | undefined;
  preset?: string | undefined;
  restoration_tau?: number | undefined;
  seed?: number | undefined;
  note?: string | undefined;
  decided_at: string;
}

/** One entry per image in every list that has no other meaning; `done` is 1 or 0. */
export interface Report {
  name: string;
  output: string;
  version: string;
  built_at: string;
  pieces: { folder: string; size: number };
  runs: Run[];
  failures: (Failure & { count: number })[];
  generative: boolean;
  done: number[];
  id: string[];
  name_of: string[];
  fingerprint: string[];
  thumbnail: string[];
  width: number[];
  height: number[];
  scores: Score[];
  flags: Flag[];
  facets: Facet[];
  settings: { label: string; values: [string, number][]; different: number }[];
  decisions: Decision[];
}

export interface Picture {
  file: string;
  width: number;
  height: number;
  tile: number;
}

/** What only the page of one image needs. */
export interface Details {
  facts: [string, string][];
  provenance: string[];
  caption: string;
  prompt: string;
  negative: string;
  settings: string;
  before: Picture | null;
  after: Picture | null;
  overlays: { name: string; file: string }[];
  problem: string;
  failure: Failure | null;
}

interface Piece {
  number: number;
  rows: Details[];
  settings: Record<string, [string, string][]>;
}

export interface Page {
  details: Details;
  settings: [string, string][];
}

declare global {
  interface Window {
    supirReport: (what: "report" | "piece", data: unknown) => void;
  }
}

const pieces = new Map<number, Promise<Piece>>();
const arrived = new Map<number, Piece>();

/** Let data scripts hand over what they hold; `start` gets the report itself. */
export function listen(start: (report: Report) => void): void {
  window.supirReport = (what, data) => {
    if (what === "report") {
      start(data as Report);
    } else {
      const piece = data as Piece;
      arrived.set(piece.number, piece);
    }
  };
}

/** The page of image number `row`; its file is loaded when it is asked for first. */
export async function pageOf(report: Report, row: number): Promise<Page> {
  const number = Math.floor(row / report.pieces.size);
  let loading = pieces.get(number);
  if (!loading) {
    loading = load(`data/${report.pieces.folder}/${number}.js`, number);
    pieces.set(number, loading);
    loading.catch(() => pieces.delete(number));
  }
  const piece = await loading;
  const details = piece.rows[row - number * report.pieces.size];
  if (!details) throw new Error("the report's data does not fit together; build the report again");
  return { details, settings: piece.settings[details.settings] ?? [] };
}

function load(source: string, number: number): Promise<Piece> {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = () => {
      const piece = arrived.get(number);
      arrived.delete(number);
      script.remove();
      if (piece) resolve(piece);
      else reject(new Error(`${source} holds no data`));
    };
    script.onerror = () => {
      script.remove();
      reject(new Error(`${source} cannot be loaded`));
    };
    document.head.append(script);
  });
}

/** The address of a picture. */
export const picture = (file: string): string => `pictures/${file}`;
