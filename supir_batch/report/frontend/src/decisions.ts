/**
 * Decisions: kept in this browser, keyed by output and fingerprint, and where a server of the project serves the
 * report, saved with it. Of two about one output the later counts.
 */

import type { Decision, Report, Verdict } from "./data";

export const PRESETS = ["fidelity", "quality", "fidelity-lightning", "quality-lightning"];
const WANTED = ["prompt", "preset", "restoration_tau", "seed"] as const;
const OPTIONAL = [...WANTED, "note"] as const;
const COLUMNS = ["id", "fingerprint", "decision", ...OPTIONAL, "decided_at"] as const;

/** Keys that decide at once. */
export const KEYS: Partial<Record<string, Verdict>> = { a: "accept", r: "reject", d: "redo", u: "undecided" };

export type Change = Partial<Omit<Decision, "id" | "fingerprint" | "decided_at">>;

export type Saving = "browser" | "saved" | "saving" | "failed";

export class Decisions {
  /** By fingerprint. */
  readonly all = new Map<string, Decision>();
  saving: Saving = "browser";
  problem = "";
  private readonly prefix: string;
  private readonly server = document.querySelector<HTMLMetaElement>('meta[name="decisions"]')?.content;
  private readonly waiting = new Map<string, Decision>();
  private readonly listeners = new Set<() => void>();
  private busy = false;

  constructor(private readonly report: Report) {
    this.prefix = `supir-batch/${report.output}/`;
    const known = new Set(report.fingerprint);
    for (const one of report.decisions) this.take(one);
    for (const one of this.stored()) {
      if (known.has(one.fingerprint) && this.take(one) && this.server) this.waiting.set(one.fingerprint, one);
    }
    if (this.server) void this.load(known);
  }

  /** Call `listener` whenever a decision or the state of saving has changed. */
  listen(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** What was decided about an output. */
  of(fingerprint: string): Decision | undefined {
    return this.all.get(fingerprint);
  }

  /** Decide about the image of a row, or change a part of what was decided. */
  change(row: number, part: Change): void {
    const [id, fingerprint] = [this.report.id[row]!, this.report.fingerprint[row]!];
    this.set({ decision: "undecided", ...this.of(fingerprint), ...part, id, fingerprint });
  }

  /** Decide; whatever a decision takes no settings for loses them. */
  set(decision: Omit<Decision, "decided_at">): void {
    const one: Decision = { ...decision, decided_at: new Date().toISOString() };
    for (const key of OPTIONAL) if (one[key] === undefined || one[key] === "") delete one[key];
    if (one.decision !== "redo") {
      for (const key of WANTED) delete one[key];
    }
    this.all.set(one.fingerprint, one);
    try {
      localStorage.setItem(this.prefix + one.fingerprint, JSON.stringify(one));
      this.problem = "";
    } catch {
      this.problem = "This browser cannot keep decisions. Export them before you close the page.";
    }
    if (this.server && complete(one)) {
      this.waiting.set(one.fingerprint, one);
      void this.save();
    }
    this.tell();
  }

  /** Those that can be handed on: a redo without another setting is not one yet. */
  whole(): Decision[] {
    return [...this.all.values()].filter((one) => complete(one) && (one.decision !== "undecided" || one.note));
  }

  private take(one: Decision): boolean {
    const earlier = this.all.get(one.fingerprint);
    if (earlier && Date.parse(earlier.decided_at) >= Date.parse(one.decided_at)) return false;
    this.all.set(one.fingerprint, one);
    return true;
  }

  private *stored(): Generator<Decision> {
    try {
      for (let at = 0; at < localStorage.length; at++) {
        const key = localStorage.key(at);
        if (!key?.startsWith(this.prefix)) continue;
        try {
          const one = JSON.parse(localStorage.getItem(key) ?? "") as Decision;
          if (typeof one.fingerprint === "string" && typeof one.decided_at === "string") yield one;
        } catch {
          this.problem = "A decision that this browser kept could not be read.";
        }
      }
    } catch {
      this.problem = "This browser keeps no decisions for this page. Export them before you close it.";
    }
  }

  private async load(known: Set<string>): Promise<void> {
    try {
      const answer = await fetch(this.server!);
      if (!answer.ok) throw new Error(`the server says ${answer.status}`);
      for (const one of (await answer.json()) as Decision[]) {
        if (known.has(one.fingerprint) && this.take(one)) this.waiting.delete(one.fingerprint);
      }
      this.saving = "saved";
      await this.save();
    } catch (error) {
      this.fail(error);
    }
    this.tell();
  }

  private async save(): Promise<void> {
    if (this.busy) return;
    this.busy = true;
    try {
      for (;;) {
        const next = this.waiting.values().next();
        if (next.done) break;
        const one = next.value;
        this.saving = "saving";
        const answer = await fetch(this.server!, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(one),
        });
        if (!answer.ok) throw new Error(await answer.text());
        if (this.waiting.get(one.fingerprint) === one) this.waiting.delete(one.fingerprint);
        this.saving = "saved";
      }
      this.problem = "";
    } catch (error) {
      this.fail(error);
    } finally {
      this.busy = false;
    }
    this.tell();
  }

  private fail(error: unknown): void {
    this.saving = "failed";
    const reason = error instanceof Error ? error.message : String(error);
    this.problem = `Not saved by the server (${reason}). The decision is kept in this browser; it is sent again with the next one.`;
  }

  private tell(): void {
    for (const listener of this.listeners) listener();
  }
}

/** Whether a decision says all that it must: redo needs another setting. */
export function complete(one: Decision): boolean {
  if (one.decision !== "redo") return true;
  return Boolean(one.prompt || one.preset || one.restoration_tau !== undefined || one.seed !== undefined);
}

/** As `supir-batch review import` reads it. */
export function toCsv(decisions: Decision[]): string {
  const field = (value: unknown) => {
    const text = value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = decisions.map((one) => COLUMNS.map((column) => field(one[column])).join(","));
  return `\ufeff${[COLUMNS.join(","), ...lines].join("\r\n")}\r\n`; // the mark makes spreadsheets read it as UTF-8
}

export const toJson = (decisions: Decision[]): string => `${JSON.stringify(decisions, null, 1)}\n`;
