/** All images, of which only those near the window are in the document. */

import type { RefObject } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { addressOf, isTyping } from "./app";
import { type Report, type Verdict, picture } from "./data";
import { type Decisions, KEYS } from "./decisions";
import { shortcutsOn } from "./help";
import { EVERYTHING, type Filter, STATES, said } from "./selection";

const GAP = 28;
const LEAST_WIDTH = 230;
const LINE = 20;
const MORE = 2; // rows beyond the window

interface Layout {
  columns: number;
  cell: number;
  box: number;
  height: number;
}

interface Props {
  report: Report;
  decisions: Decisions;
  rows: number[];
  filter: Filter;
  setFilter: (filter: Filter) => void;
  current: RefObject<number>;
}

export function Gallery(props: Props) {
  const { report, decisions, rows, current } = props;
  const grid = useRef<HTMLUListElement>(null);
  const noted = [...decisions.all.values()].some((one) => one.note);
  const lines = 1 + Number(report.scores.some((one) => one.column === props.filter.sort)) + Number(noted);
  const [layout, setLayout] = useState<Layout>({ columns: 1, cell: LEAST_WIDTH, box: LEAST_WIDTH, height: 300 });
  const [seen, setSeen] = useState({ first: 0, last: 0 });
  const stride = layout.height + GAP;

  useLayoutEffect(() => {
    const element = grid.current!;
    const measure = () => {
      const width = element.clientWidth;
      const columns = Math.max(1, Math.floor((width + GAP) / (LEAST_WIDTH + GAP)));
      const cell = (width - GAP * (columns - 1)) / columns;
      const box = Math.round(cell * 0.8);
      setLayout({ columns, cell, box, height: box + 10 + lines * LINE });
    };
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, [lines]);

  useLayoutEffect(() => {
    const look = () => {
      const top = -grid.current!.getBoundingClientRect().top;
      const first = Math.max(0, Math.floor(top / stride) - MORE);
      const last = Math.max(0, Math.ceil((top + innerHeight) / stride) + MORE);
      setSeen((before) => (before.first === first && before.last === last ? before : { first, last }));
    };
    look();
    addEventListener("scroll", look, { passive: true });
    addEventListener("resize", look);
    return () => {
      removeEventListener("scroll", look);
      removeEventListener("resize", look);
    };
  }, [stride, rows]);

  /** Bring an entry of the list into the window. */
  const reveal = (at: number) => {
    const element = grid.current!;
    const top = element.getBoundingClientRect().top + scrollY + Math.floor(at / layout.columns) * stride;
    const margin = 200; // the bars above
    if (top < scrollY + margin) scrollTo(0, top - margin);
    else if (top + stride > scrollY + innerHeight) scrollTo(0, top + stride - innerHeight);
  };

  useEffect(() => {
    const at = rows.indexOf(current.current ?? -1);
    if (at >= 0 && layout.columns > 0) reveal(at);
    // when the gallery is entered, and once more when its width is known
  }, [layout.columns]);

  useLayoutEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (isTyping(event) || !shortcutsOn()) return;
      const focused = (document.activeElement as HTMLElement | null)?.closest<HTMLElement>("[data-at]");
      const at = focused ? Number(focused.dataset.at) : -1;
      if (event.key === "j" || event.key === "k") {
        const next = Math.min(rows.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)));
        if (next < 0) return;
        reveal(next);
        requestAnimationFrame(() =>
          requestAnimationFrame(() =>
            grid.current?.querySelector<HTMLElement>(`[data-at="${next}"] a`)?.focus({ preventScroll: true }),
          ),
        );
      } else if (at >= 0) {
        const row = rows[at]!;
        const decision = KEYS[event.key];
        // what a redo is to change is asked on the page of its image
        if (!decision || decision === "redo" || !report.done[row]) return;
        decisions.change(row, { decision });
      } else return;
      event.preventDefault();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });

  const first = seen.first * layout.columns;
  const shown = rows.slice(first, seen.last * layout.columns);
  const tall = Math.ceil(rows.length / layout.columns) * stride;
  return (
    <div class="gallery">
      <Filters {...props} />
      <ul ref={grid} class="grid" style={{ height: `${Math.max(0, tall - GAP)}px` }} aria-label="Images">
        {shown.map((row, number) => {
          const at = first + number;
          const place = {
            width: `${layout.cell}px`,
            height: `${layout.height}px`,
            transform: `translate(${(at % layout.columns) * (layout.cell + GAP)}px, ${Math.floor(at / layout.columns) * stride}px)`,
          };
          return (
            <li key={row} data-at={at} style={place} aria-setsize={rows.length} aria-posinset={at + 1}>
              <Card {...props} row={row} box={layout.box} />
            </li>
          );
        })}
      </ul>
      {rows.length === 0 && (
        <p class="empty">
          No image is left by these filters.{" "}
          <button type="button" class="link" onClick={() => props.setFilter(EVERYTHING)}>
            Show all
          </button>
        </p>
      )}
    </div>
  );
}

const VERDICTS: Record<Verdict, string> = { accept: "accepted", reject: "rejected", redo: "to redo", undecided: "" };

function Card({ report, decisions, row, box, filter }: Props & { row: number; box: number }) {
  const name = report.name_of[row]!;
  const decision = decisions.of(report.fingerprint[row]!);
  const verdict = decision?.decision ?? "undecided";
  const score = report.scores.find((one) => one.column === filter.sort);
  const value = score?.values[row];
  const failure = report.facets.find((facet) => facet.column === "failure_kind");
  const thumbnail = report.thumbnail[row];
  const slash = name.lastIndexOf("/") + 1;
  return (
    <a href={addressOf(report, row)} class="card">
      <span class="mat" style={{ height: `${box}px` }}>
        {thumbnail ? (
          <img src={picture(thumbnail)} alt="" decoding="async" draggable={false} />
        ) : (
          <span class="none">{report.done[row] ? "no picture" : (failure?.values[failure.codes[row]!] ?? "failed")}</span>
        )}
        {verdict !== "undecided" && <span class={`stamp ${verdict}`}>{VERDICTS[verdict]}</span>}
      </span>
      <span class="label">
        <span class="folder">{name.slice(0, slash)}</span>
        <span class="file">{name.slice(slash)}</span>
      </span>
      {score && (
        <span class="value">
          {score.label} {value === null || value === undefined ? "not measured" : said(value)}
        </span>
      )}
      {decision?.note && <span class="noted">{decision.note}</span>}
    </a>
  );
}

function Filters({ report, rows, filter, setFilter }: Props) {
  const set = (part: Partial<Filter>) => setFilter({ ...filter, ...part });
  const range = report.scores.find((one) => one.column === filter.range?.column);
  const bound = (key: "least" | "most", text: string) => {
    const value = text === "" ? (key === "least" ? -Infinity : Infinity) : Number(text);
    if (filter.range && !Number.isNaN(value)) set({ range: { ...filter.range, [key]: value } });
  };
  const facets = report.facets.filter((facet) => facet.values.length > 1 || facet.column === "failure_kind");
  const scores = report.scores.map((score) => (
    <option key={score.column} value={score.column}>
      {score.label}
    </option>
  ));
  return (
    <form class="filters" role="search" aria-label="Images" onSubmit={(event) => event.preventDefault()}>
      <h1>
        {rows.length.toLocaleString("en")}
        {rows.length < report.id.length && <span> of {report.id.length.toLocaleString("en")}</span>}{" "}
        {report.id.length === 1 ? "image" : "images"}
      </h1>
      <label>
        <span>Name</span>
        <input type="search" value={filter.text} onInput={(event) => set({ text: event.currentTarget.value })} />
      </label>
      <label>
        <span>Show</span>
        <select value={filter.state} onChange={(event) => set({ state: event.currentTarget.value })}>
          {STATES.map(([value, text]) => (
            <option key={value} value={value}>
              {text}
            </option>
          ))}
          {report.flags.map((flag) => (
            <option key={flag.column} value={`flag:${flag.column}`}>
              {flag.label}
            </option>
          ))}
        </select>
      </label>
      {facets.map((facet) => (
        <label key={facet.column}>
          <span>{facet.label}</span>
          <select
            value={filter.facets[facet.column] ?? ""}
            onChange={(event) => set({ facets: { ...filter.facets, [facet.column]: event.currentTarget.value } })}
          >
            <option value="">Any</option>
            {facet.values.map((value) => (
              <option key={value} value={value}>
                {value}
              </option>
            ))}
          </select>
        </label>
      ))}
      {report.scores.length > 0 && (
        <fieldset>
          <label>
            <span>Score between</span>
            <select
              value={filter.range?.column ?? ""}
              onChange={(event) => {
                const column = event.currentTarget.value;
                set({ range: column ? { column, least: -Infinity, most: Infinity } : null });
              }}
            >
              <option value="">Any</option>
              {scores}
            </select>
          </label>
          {range &&
            (["least", "most"] as const).map((key) => (
              <label key={key}>
                <span>{key === "least" ? "At least" : "At most"}</span>
                <input
                  type="number"
                  step="any"
                  value={Number.isFinite(filter.range![key]) ? Number(filter.range![key].toPrecision(5)) : ""}
                  onChange={(event) => bound(key, event.currentTarget.value)}
                />
              </label>
            ))}
        </fieldset>
      )}
      <label>
        <span>Sort by</span>
        <select value={filter.sort} onChange={(event) => set({ sort: event.currentTarget.value })}>
          <option value="name">Name</option>
          <option value="size">Size</option>
          {scores}
        </select>
      </label>
      <button type="button" class="quiet" aria-pressed={filter.descending} onClick={() => set({ descending: !filter.descending })}>
        Highest first
      </button>
    </form>
  );
}
