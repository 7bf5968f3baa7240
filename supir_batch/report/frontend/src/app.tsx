/** The one page: what is shown follows the part of the address behind `#`. */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Report, Verdict } from "./data";
import { type Decisions, complete, toCsv, toJson } from "./decisions";
import { Gallery } from "./gallery";
import { Help, shortcutsOn } from "./help";
import { ImagePage } from "./image";
import { Overview } from "./overview";
import { EVERYTHING, type Filter, select } from "./selection";
import { applyTheme, theme } from "./theme";

export interface Route {
  page: "overview" | "images" | "image";
  id: string;
}

function route(): Route {
  const [, page, ...rest] = location.hash.split("/");
  if (page === "image") return { page, id: safely(rest.join("/")) };
  return { page: page === "images" ? "images" : "overview", id: "" };
}

function safely(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const addressOf = (report: Report, row: number): string => `#/image/${encodeURIComponent(report.id[row]!)}`;

export function App({ report, decisions }: { report: Report; decisions: Decisions }) {
  const [at, setAt] = useState(route);
  const [filter, setFilter] = useState<Filter>(EVERYTHING);
  const [help, setHelp] = useState(false);
  const [, setChanges] = useState(0);
  const current = useRef(-1);

  useEffect(() => decisions.listen(() => setChanges((count) => count + 1)), [decisions]);
  useEffect(() => {
    const follow = () => setAt(route());
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);

  // Not anew with each decision: who decides on what is open must not lose the place in the list.
  const rows = useMemo(() => select(report, filter, decisions), [report, filter, at.page === "images"]);
  const row = at.page === "image" ? report.id.indexOf(at.id) : -1;
  const inside = row < 0 || rows.includes(row);
  const list = useMemo(() => (inside ? rows : select(report, EVERYTHING, decisions)), [report, rows, inside]);
  if (row >= 0) current.current = row;

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key !== "?" || isTyping(event) || !shortcutsOn()) return;
      event.preventDefault();
      setHelp(true);
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);

  const show = (next: Filter) => {
    setFilter(next);
    location.hash = "#/images";
  };
  return (
    <>
      <Header report={report} decisions={decisions} at={at} onHelp={() => setHelp(true)} />
      <main id="main" tabIndex={-1}>
        {at.page === "overview" && <Overview report={report} decisions={decisions} show={show} />}
        {at.page === "images" && (
          <Gallery report={report} decisions={decisions} rows={rows} filter={filter} setFilter={setFilter} current={current} />
        )}
        {at.page === "image" && row >= 0 && (
          <ImagePage key={row} report={report} decisions={decisions} row={row} rows={list} />
        )}
        {at.page === "image" && row < 0 && (
          <section class="sheet">
            <h1>No such image</h1>
            <p>
              This report has no image “{at.id}”. <a href="#/images">All images</a>
            </p>
          </section>
        )}
      </main>
      {help && <Help close={() => setHelp(false)} />}
    </>
  );
}

/** Whether a key belongs to a field and not to the page. */
export function isTyping(event: KeyboardEvent): boolean {
  if (event.ctrlKey || event.metaKey || event.altKey) return true;
  const target = event.target as HTMLElement | null;
  return Boolean(target?.closest("input:not([type=checkbox]), textarea, select, dialog"));
}

const WORDS: [Verdict | "open", string][] = [
  ["accept", "accepted"],
  ["reject", "rejected"],
  ["redo", "to redo"],
  ["open", "open"],
];

function Header(props: { report: Report; decisions: Decisions; at: Route; onHelp: () => void }) {
  const { report, decisions, at } = props;
  const [dark, setDark] = useState(theme() === "dark");
  useEffect(() => {
    const follow = () => setDark(theme() === "dark");
    addEventListener("theme", follow);
    return () => removeEventListener("theme", follow);
  }, []);
  const counts = countsOf(report, decisions);
  const link = (page: Route["page"], text: string, hash: string) => (
    <a href={hash} aria-current={at.page === page ? "page" : undefined}>
      {text}
    </a>
  );
  return (
    <header class="bar">
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), document.getElementById("main")?.focus())}>
        Skip to content
      </a>
      <p class="name">
        <span>{report.name}</span>
      </p>
      <nav aria-label="Report">
        {link("overview", "Overview", "#/")}
        {link(at.page === "image" ? "image" : "images", "Images", "#/images")}
      </nav>
      <p class="tally" role="status" aria-label="Decisions">
        {WORDS.filter(([verdict]) => counts[verdict]).map(([verdict, word]) => (
          <span key={verdict} class={`count ${verdict}`}>
            <b>{counts[verdict].toLocaleString("en")}</b> {word}
          </span>
        ))}
        {decisions.saving !== "browser" && (
          <span class="saving">{{ saved: "saved", saving: "saving…", failed: "not saved" }[decisions.saving]}</span>
        )}
      </p>
      <Export report={report} decisions={decisions} />
      <button
        type="button"
        class="quiet"
        aria-pressed={dark}
        onClick={() => applyTheme(dark ? "light" : "dark")}
      >
        Dark
      </button>
      <button type="button" class="quiet" onClick={props.onHelp} aria-label="Help and keyboard">
        ?
      </button>
      {decisions.problem && (
        <p class="problem" role="alert">
          {decisions.problem}
        </p>
      )}
    </header>
  );
}

export function countsOf(report: Report, decisions: Decisions): Record<Verdict | "open", number> {
  const counts = { accept: 0, reject: 0, redo: 0, undecided: 0, open: 0 };
  report.fingerprint.forEach((fingerprint, row) => {
    if (!report.done[row]) return;
    const verdict = decisions.of(fingerprint)?.decision ?? "undecided";
    counts[verdict]++;
    if (verdict === "undecided") counts.open++;
  });
  return counts;
}

function Export({ report, decisions }: { report: Report; decisions: Decisions }) {
  const box = useRef<HTMLDetailsElement>(null);
  const whole = decisions.whole();
  const lacking = [...decisions.all.values()].filter((one) => !complete(one)).length;
  const save = (text: string, kind: string, type: string) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = `decisions-${report.output}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    if (box.current) box.current.open = false;
  };
  return (
    <details class="menu" ref={box}>
      <summary>Export</summary>
      <div>
        <p>
          {whole.length} {whole.length === 1 ? "decision" : "decisions"}, for <code>supir-batch review import</code>
        </p>
        {lacking > 0 && <p class="problem">{lacking} to redo without another setting; left out.</p>}
        <button type="button" onClick={() => save(toCsv(whole), "csv", "text/csv")}>
          As CSV
        </button>
        <button type="button" onClick={() => save(toJson(whole), "json", "application/json")}>
          As JSON
        </button>
      </div>
    </details>
  );
}
