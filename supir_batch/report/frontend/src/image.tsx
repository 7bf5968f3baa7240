/** The page of one image: before and after, what was done, what it scores, and what to decide. */

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { addressOf, isTyping } from "./app";
import { type Details, type Page, type Report, pageOf } from "./data";
import { type Decisions, KEYS } from "./decisions";
import { shortcutsOn } from "./help";
import { spread } from "./histogram";
import { Review } from "./review";
import { said } from "./selection";
import { Comparison } from "./viewer";

interface Props {
  report: Report;
  decisions: Decisions;
  row: number;
  rows: number[];
}

export function ImagePage({ report, decisions, row, rows }: Props) {
  const [page, setPage] = useState<Page | null>(null);
  const [problem, setProblem] = useState("");
  const place = rows.indexOf(row);
  const name = report.name_of[row]!;

  useEffect(() => {
    scrollTo(0, 0);
    let gone = false;
    pageOf(report, row).then(
      (found) => gone || setPage(found),
      (error: Error) => gone || setProblem(error.message),
    );
    return () => {
      gone = true;
    };
  }, [report, row]);

  // at once, so that no key is lost between two images
  useLayoutEffect(() => {
    const go = (way: number) => {
      const next = rows[place + way];
      if (next !== undefined) location.hash = addressOf(report, next);
    };
    const onKey = (event: KeyboardEvent) => {
      if (event.key === "Escape" && (event.target as HTMLElement).closest("input, textarea, select")) {
        (event.target as HTMLElement).blur();
        return;
      }
      if (event.repeat || isTyping(event) || !shortcutsOn()) return;
      const decision = KEYS[event.key];
      if (event.key === "j") go(1);
      else if (event.key === "k") go(-1);
      else if (event.key === "Escape" && !document.querySelector("dialog")) location.hash = "#/images";
      else if (event.key === "n") document.getElementById("note")?.focus();
      else if (decision && report.done[row]) decisions.change(row, { decision });
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, [report, decisions, row, rows]);

  const step = (way: number, text: string) => {
    const next = rows[place + way];
    return next === undefined ? (
      <span class="step" aria-hidden="true">
        {text}
      </span>
    ) : (
      <a class="step" href={addressOf(report, next)}>
        {text}
      </a>
    );
  };
  return (
    <article class="image">
      <div class="heading">
        <div>
          <p class="over">
            <a href="#/images">Images</a>
            {name.includes("/") && ` / ${name.slice(0, name.lastIndexOf("/")).replaceAll("/", " / ")}`}
          </p>
          <h1>{name.slice(name.lastIndexOf("/") + 1)}</h1>
        </div>
        <nav aria-label="Neighboring images">
          {step(-1, "Previous")}
          <span class="soft">
            {(place + 1).toLocaleString("en")} of {rows.length.toLocaleString("en")}
          </span>
          {step(1, "Next")}
        </nav>
      </div>
      {problem && (
        <p class="problem" role="alert">
          {problem}
        </p>
      )}
      {page && (
        <>
          <Stage details={page.details} />
          <div class="below">
            <div class="text">
              {page.details.failure && (
                <section class="failed">
                  <h2>Not restored: {page.details.failure.kind}</h2>
                  <p>{page.details.failure.message}</p>
                  <p class="soft">
                    Stage {page.details.failure.stage}.{" "}
                    {page.details.failure.retryable ? "Trying again can help." : "Trying again alone will not help."}
                  </p>
                </section>
              )}
              {(page.details.caption || page.details.prompt) && <Prompts details={page.details} />}
              <Scores report={report} row={row} />
              {page.details.provenance.length > 0 && (
                <section>
                  <h2>Provenance</h2>
                  {page.details.provenance.map((sentence) => (
                    <p key={sentence} class={/SHA-256|^Fingerprint/.test(sentence) ? "hash" : ""}>
                      {sentence}
                    </p>
                  ))}
                </section>
              )}
              <section>
                <h2>Facts</h2>
                <Pairs pairs={[...page.details.facts, ["Id", report.id[row]!]]} />
              </section>
              <section>
                <details>
                  <summary>All settings</summary>
                  <Pairs pairs={page.settings} />
                </details>
              </section>
            </div>
            {report.done[row] === 1 && <Review report={report} decisions={decisions} row={row} details={page.details} settings={page.settings} />}
          </div>
        </>
      )}
    </article>
  );
}

function Pairs({ pairs }: { pairs: [string, string][] }) {
  return (
    <dl class="pairs">
      {pairs.map(([key, value]) => (
        <div key={key}>
          <dt>{key}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

function Prompts({ details }: { details: Details }) {
  return (
    <section>
      <h2>Caption and prompts</h2>
      {details.caption && <blockquote>{details.caption}</blockquote>}
      <Pairs
        pairs={(
          [
            ["Prompt", details.prompt],
            ["Negative prompt", details.negative],
          ] as [string, string][]
        ).filter(([, text]) => text)}
      />
    </section>
  );
}

/** Each score with its place among those of all images. */
function Scores({ report, row }: { report: Report; row: number }) {
  const scores = report.scores.filter((score) => score.values[row] !== null);
  const flags = report.flags.filter((flag) => flag.rows.includes(row));
  if (!scores.length && !flags.length) return null;
  return (
    <section>
      <h2>Scores</h2>
      {flags.length > 0 && (
        <p class="flags">
          {flags.map((flag) => (
            <span key={flag.column}>{flag.label}</span>
          ))}
        </p>
      )}
      <table class="scores">
        <thead class="unseen">
          <tr>
            <th scope="col">Score</th>
            <th scope="col">Value</th>
            <th scope="col">Place among all images</th>
          </tr>
        </thead>
        <tbody>
          {scores.map((score) => {
            const { least, most } = spread(score);
            const value = score.values[row]!;
            const share = most === least ? 50 : ((value - least) / (most - least)) * 100;
            return (
              <tr key={score.column}>
                <th scope="row">
                  {score.label}
                  {score.meaning && <small>{score.meaning}</small>}
                </th>
                <td class="number">{said(value)}</td>
                <td>
                  <svg class="scale" viewBox="0 0 104 12" role="img" aria-label={`between ${said(least)} and ${said(most)}`}>
                    <line x1="2" x2="102" y1="6" y2="6" />
                    <circle cx={2 + share} cy="6" r="4" />
                  </svg>
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </section>
  );
}

type Mode = "slider" | "sides" | "after" | "before";
const MODES: [Mode, string][] = [
  ["slider", "Slider"],
  ["sides", "Side by side"],
  ["before", "Before"],
  ["after", "Restored"],
];
// the next image is looked at in the same way
let lastMode: Mode = "slider";
let lastOverlay = "";

function Stage({ details }: { details: Details }) {
  const before = useRef<HTMLDivElement>(null);
  const after = useRef<HTMLDivElement>(null);
  const stage = useRef<HTMLDivElement>(null);
  const comparison = useRef<Comparison | null>(null);
  const [mode, setMode] = useState<Mode>(lastMode);
  const [held, setHeld] = useState(false);
  const [at, setAt] = useState(50);
  const [scale, setScale] = useState(0);
  const [overlay, setOverlay] = useState(lastOverlay);
  const [opacity, setOpacity] = useState(60);

  useEffect(() => {
    if (!details.before || !details.after) return;
    const opened = new Comparison([before.current!, after.current!], details.before, details.after, setScale);
    comparison.current = opened;
    return () => opened.close();
  }, [details]);

  useEffect(() => {
    lastMode = mode;
    lastOverlay = overlay;
  }, [mode, overlay]);

  useEffect(() => {
    const found = details.overlays.find((one) => one.name === overlay);
    comparison.current?.lay(found?.file ?? null, opacity / 100);
  }, [overlay, details]);
  useEffect(() => comparison.current?.fade(opacity / 100), [opacity]);

  useLayoutEffect(() => {
    const down = (event: KeyboardEvent) => {
      if (isTyping(event) || !shortcutsOn()) return;
      if (event.key === "b") setHeld(true);
      else if (event.key === "s") setMode("slider");
      else if (event.key === "t") setMode("sides");
      else if (event.key === "f") comparison.current?.fit();
      else if (event.key === "1") comparison.current?.oneToOne();
      else if ((event.target as HTMLElement).closest(".viewer")) return; // its own keys zoom
      else if (event.key === "+") comparison.current?.zoomBy(1.5);
      else if (event.key === "-") comparison.current?.zoomBy(1 / 1.5);
    };
    const up = (event: KeyboardEvent) => {
      if (event.key === "b") setHeld(false);
    };
    addEventListener("keydown", down);
    addEventListener("keyup", up);
    return () => {
      removeEventListener("keydown", down);
      removeEventListener("keyup", up);
    };
  }, []);

  if (!details.before || !details.after) {
    return details.problem ? (
      <p class="problem">No pictures: {details.problem}</p>
    ) : null;
  }
  const drag = (event: PointerEvent) => {
    if (!(event.buttons & 1)) return;
    const box = stage.current!.getBoundingClientRect();
    setAt(Math.min(100, Math.max(0, ((event.clientX - box.left) / box.width) * 100)));
  };
  const onSliderKey = (event: KeyboardEvent) => {
    const step = ({ ArrowLeft: -2, ArrowRight: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 } as Record<string, number>)[event.key];
    if (step === undefined) return;
    event.preventDefault();
    setAt((value) => Math.min(100, Math.max(0, value + step)));
  };
  const shown = held ? "before" : mode;
  const laid = details.overlays.some((one) => one.name === overlay) ? overlay : "";
  return (
    <section class="looking" aria-label="Before and after">
      <div ref={stage} class={`stage ${shown}`} style={{ "--at": `${at}%` }}>
        <div class="pane after">
          <div ref={after} class="viewer" />
          <span class="tag">Restored</span>
        </div>
        <div class="pane before">
          <div ref={before} class="viewer" />
          <span class="tag">Before</span>
        </div>
        {shown === "slider" && (
          <div
            class="handle"
            role="slider"
            tabIndex={0}
            aria-label="Share that shows the image before restoration"
            aria-valuemin={0}
            aria-valuemax={100}
            aria-valuenow={Math.round(at)}
            aria-valuetext={`${Math.round(at)} percent`}
            onKeyDown={onSliderKey}
            onPointerDown={(event) => {
              event.currentTarget.setPointerCapture(event.pointerId);
              drag(event);
            }}
            onPointerMove={drag}
          >
            <span />
          </div>
        )}
      </div>
      <div class="tools" role="toolbar" aria-label="View">
        <div class="choice">
          {MODES.map(([value, text]) => (
            <button key={value} type="button" aria-pressed={mode === value} onClick={() => setMode(value)}>
              {text}
            </button>
          ))}
        </div>
        <div class="choice">
          <button type="button" onClick={() => comparison.current?.fit()}>
            Fit
          </button>
          <button type="button" onClick={() => comparison.current?.oneToOne()}>
            1 : 1
          </button>
          <button type="button" aria-label="Zoom out" onClick={() => comparison.current?.zoomBy(1 / 1.5)}>
            −
          </button>
          <button type="button" aria-label="Zoom in" onClick={() => comparison.current?.zoomBy(1.5)}>
            +
          </button>
          <output aria-label="Scale">{scale ? `${Math.round(scale * 100)} %` : ""}</output>
        </div>
        {details.overlays.length > 0 && (
          <div class="choice">
            <label>
              <span>Lay over</span>
              <select value={laid} onChange={(event) => setOverlay(event.currentTarget.value)}>
                <option value="">nothing</option>
                {details.overlays.map((one) => (
                  <option key={one.name} value={one.name}>
                    {one.name.charAt(0).toUpperCase() + one.name.slice(1)}
                  </option>
                ))}
              </select>
            </label>
            {laid && (
              <label>
                <span>Strength</span>
                <input type="range" min={5} max={100} value={opacity} onInput={(event) => setOpacity(Number(event.currentTarget.value))} />
              </label>
            )}
          </div>
        )}
      </div>
    </section>
  );
}
