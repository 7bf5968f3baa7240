/** What to decide about an image: accept, reject, redo with other settings; a note. */

import { useEffect, useRef, useState } from "preact/hooks";
import type { Decision, Details, Report, Verdict } from "./data";
import { type Change, type Decisions, PRESETS, complete } from "./decisions";

interface Props {
  report: Report;
  decisions: Decisions;
  row: number;
  details: Details;
  settings: [string, string][];
}

const CHOICES: [Verdict, string, string][] = [
  ["accept", "Accept", "a"],
  ["reject", "Reject", "r"],
  ["redo", "Redo", "d"],
];

export function Review({ report, decisions, row, details, settings }: Props) {
  const decision = decisions.of(report.fingerprint[row]!);
  const verdict = decision?.decision ?? "undecided";
  const change = (part: Change) => decisions.change(row, part);
  return (
    <aside class="review" aria-label="Decision">
      <h2>Decision</h2>
      <div class="verdicts">
        {CHOICES.map(([value, text, key]) => (
          <button
            key={value}
            type="button"
            class={value}
            aria-pressed={verdict === value}
            aria-keyshortcuts={key}
            onClick={() => change({ decision: verdict === value ? "undecided" : value })}
          >
            {text} <kbd aria-hidden="true">{key}</kbd>
          </button>
        ))}
      </div>
      {verdict === "redo" && decision && (
        <Redo decision={decision} details={details} settings={settings} change={change} />
      )}
      <label class="field">
        <span>Note</span>
        <Text id="note" value={decision?.note ?? ""} keep={(note) => change({ note })} />
      </label>
      {decision && verdict !== "undecided" && (
        <p class="soft">Decided {new Date(decision.decided_at).toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" })}</p>
      )}
    </aside>
  );
}

const PAUSE = 800; // milliseconds

/** A field whose text is kept when somebody leaves it or pauses, and is never overwritten while it is written. */
function Text(props: { value: string; keep: (text: string) => void; id?: string; placeholder?: string }) {
  const [draft, setDraft] = useState<string | null>(null);
  const timer = useRef<ReturnType<typeof setTimeout> | undefined>(undefined);
  const latest = useRef<() => void>(() => {});
  latest.current = () => {
    clearTimeout(timer.current);
    if (draft !== null && draft !== props.value) props.keep(draft);
  };
  useEffect(() => () => latest.current(), []);
  return (
    <textarea
      rows={3}
      value={draft ?? props.value}
      onInput={(event) => {
        setDraft(event.currentTarget.value);
        clearTimeout(timer.current);
        timer.current = setTimeout(() => latest.current(), PAUSE);
      }}
      onBlur={() => {
        latest.current();
        setDraft(null);
      }}
      {...(props.id && { id: props.id })}
      {...(props.placeholder && { placeholder: props.placeholder })}
    />
  );
}

function Redo(props: { decision: Decision; details: Details; settings: [string, string][]; change: (part: Change) => void }) {
  const { decision, details, settings, change } = props;
  const now = (label: string) => settings.find(([key]) => key === label)?.[1] ?? "";
  const [wrong, setWrong] = useState("");
  /** Keep a number within its bounds; an empty field is no setting. */
  const number = (key: "restoration_tau" | "seed", text: string, fits: (value: number) => boolean, words: string) => {
    const value = Number(text);
    if (text !== "" && !fits(value)) {
      setWrong(words);
      return;
    }
    setWrong("");
    change({ [key]: text === "" ? undefined : value });
  };
  return (
    <fieldset class="redo">
      <legend>Redo with</legend>
      <label class="field">
        <span>Prompt</span>
        <Text
          placeholder={details.caption || details.prompt}
          value={decision.prompt ?? ""}
          keep={(prompt) => change({ prompt: prompt.trim() })}
        />
      </label>
      <div class="two">
        <label class="field">
          <span>Preset</span>
          <select value={decision.preset ?? ""} onChange={(event) => change({ preset: event.currentTarget.value })}>
            <option value="">as before</option>
            {PRESETS.map((preset) => (
              <option key={preset} value={preset}>
                {preset}
              </option>
            ))}
          </select>
        </label>
        <label class="field">
          <span>Restoration tau</span>
          <input
            type="number"
            min={0.01}
            max={100}
            step="any"
            placeholder={now("restoration tau")}
            value={decision.restoration_tau ?? ""}
            onChange={(event) =>
              number("restoration_tau", event.currentTarget.value, (value) => value > 0 && value <= 100, "Restoration tau lies above 0 and up to 100.")
            }
          />
        </label>
        <label class="field">
          <span>Seed</span>
          <input
            type="number"
            min={0}
            step={1}
            value={decision.seed ?? ""}
            onChange={(event) =>
              number("seed", event.currentTarget.value, (value) => Number.isSafeInteger(value) && value >= 0, "A seed is a whole number from 0.")
            }
          />
        </label>
      </div>
      {wrong && (
        <p class="problem" role="alert">
          {wrong}
        </p>
      )}
      {!complete(decision) && <p class="soft">Change at least one: the same settings give the same image.</p>}
    </fieldset>
  );
}
