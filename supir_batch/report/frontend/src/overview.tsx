import type { Report } from "./data";
import { countsOf } from "./app";
import type { Decisions } from "./decisions";
import { Histogram } from "./histogram";
import { EVERYTHING, type Filter } from "./selection";

const whole = (value: number) => Math.round(value).toLocaleString("en");

function duration(seconds: number): string {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

function date(text: string | null, time = false): string {
  if (!text) return "";
  const options: Intl.DateTimeFormatOptions = { day: "numeric", month: "long", year: "numeric" };
  return new Date(text).toLocaleString("en-GB", time ? { ...options, hour: "2-digit", minute: "2-digit" } : options);
}

export function Overview(props: { report: Report; decisions: Decisions; show: (filter: Filter) => void }) {
  const { report, decisions, show } = props;
  const done = report.done.reduce((sum, one) => sum + one, 0);
  const failed = report.done.length - done;
  const counts = countsOf(report, decisions);
  const seconds = report.runs.reduce((sum, run) => sum + run.seconds, 0);
  const megapixels = report.runs.reduce((sum, run) => sum + run.megapixels, 0);
  const made = report.runs.reduce((sum, run) => sum + run.done, 0);
  const engines = report.facets.find((facet) => facet.column === "setting_engine_name")?.values ?? [];
  const last = report.runs.at(-1);
  const figures: [string, string, Filter | null][] = [
    [whole(done), done === 1 ? "image restored" : "images restored", { ...EVERYTHING, state: "restored" }],
    [whole(failed), "failed", failed ? { ...EVERYTHING, state: "failed" } : null],
    [whole(counts.open), "not yet decided", counts.open ? { ...EVERYTHING, state: "open" } : null],
    [whole(megapixels), "megapixels", null],
    [seconds ? whole((made / seconds) * 3600) : "0", "images an hour", null],
  ];
  const shared = report.settings.filter((one) => one.different === 1);
  const differing = report.settings.filter((one) => one.different > 1);
  return (
    <div class="overview">
      <section class="title">
        <p class="over">Restoration report</p>
        <h1>{report.name}</h1>
        <p class="lead">
          {engines.length > 0 && <>Restored with {engines.join(", ")}. </>}
          {last?.started_at && <>Last run {date(last.started_at)}. </>}
        </p>
        {report.generative && (
          <p class="notice">
            These are generative reconstructions: detail in them may never have been in the original. None of them is a
            record copy.
          </p>
        )}
        <p>
          <a class="call" href="#/images">
            Look at the images
          </a>
        </p>
      </section>

      <ul class="figures">
        {figures.map(([value, label, filter]) => (
          <li key={label}>
            {filter ? (
              <button type="button" onClick={() => show(filter)}>
                <b>{value}</b>
                <span>{label}</span>
              </button>
            ) : (
              <>
                <b>{value}</b>
                <span>{label}</span>
              </>
            )}
          </li>
        ))}
      </ul>

      {report.failures.length > 0 && (
        <section aria-labelledby="failures">
          <h2 id="failures">Not restored</h2>
          <div class="scroll" tabIndex={0} role="region" aria-label="Failures by cause">
            <table>
              <thead>
                <tr>
                  <th scope="col">Cause</th>
                  <th scope="col" class="number">
                    Images
                  </th>
                  <th scope="col">Stage</th>
                  <th scope="col">For example</th>
                </tr>
              </thead>
              <tbody>
                {report.failures.map((one) => (
                  <tr key={one.kind}>
                    <th scope="row">
                      <button
                        type="button"
                        class="link"
                        onClick={() => show({ ...EVERYTHING, facets: { failure_kind: one.kind } })}
                      >
                        {one.kind}
                      </button>
                    </th>
                    <td class="number">{whole(one.count)}</td>
                    <td>{one.stage}</td>
                    <td>
                      {one.message}
                      {one.retryable && " Trying again can help."}
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </section>
      )}

      {report.scores.length > 0 && (
        <section aria-labelledby="scores">
          <h2 id="scores">Scores</h2>
          <p class="soft">How the images are spread over each score. Choose a bar to see the images in it.</p>
          <div class="plots">
            {report.scores.map((score) => (
              <Histogram key={score.column} score={score} show={show} />
            ))}
          </div>
        </section>
      )}

      {report.flags.length > 0 && (
        <section aria-labelledby="flags">
          <h2 id="flags">Flags</h2>
          <ul class="plain">
            {report.flags.map((flag) => (
              <li key={flag.column}>
                <button type="button" class="link" onClick={() => show({ ...EVERYTHING, state: `flag:${flag.column}` })}>
                  {flag.label}
                </button>{" "}
                {whole(flag.rows.length)}
              </li>
            ))}
          </ul>
        </section>
      )}

      {report.runs.length > 0 && (
        <section aria-labelledby="runs">
          <h2 id="runs">Runs</h2>
          <div class="scroll" tabIndex={0} role="region" aria-label="Table of runs">
            <table>
              <thead>
                <tr>
                  <th scope="col">Began</th>
                  <th scope="col" class="number">
                    Restored
                  </th>
                  <th scope="col" class="number">
                    Failed
                  </th>
                  <th scope="col" class="number">
                    Megapixels
                  </th>
                  <th scope="col" class="number">
                    Took
                  </th>
                  <th scope="col">Run</th>
                </tr>
              </thead>
              <tbody>
                {report.runs.toReversed().map((run) => (
                  <tr key={run.run}>
                    <td>{date(run.started_at, true)}</td>
                    <td class="number">{whole(run.done)}</td>
                    <td class="number">{whole(run.failed)}</td>
                    <td class="number">{run.megapixels.toLocaleString("en", { maximumFractionDigits: 1 })}</td>
                    <td class="number">{duration(run.seconds)}</td>
                    <td class="mono">{run.run}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </section>
      )}

      <section aria-labelledby="settings">
        <h2 id="settings">Settings</h2>
        {differing.length > 0 && (
          <>
            <h3>Different between images</h3>
            <dl class="pairs">
              {differing.map((one) => (
                <div key={one.label}>
                  <dt>{one.label}</dt>
                  <dd>
                    {one.values.map(([value, count]) => `${value} (${whole(count)})`).join(", ")}
                    {one.different > one.values.length && `, and ${whole(one.different - one.values.length)} more`}
                  </dd>
                </div>
              ))}
            </dl>
            <h3>The same for all that use them</h3>
          </>
        )}
        <dl class="pairs columns">
          {shared.map((one) => (
            <div key={one.label}>
              <dt>{one.label}</dt>
              <dd>{one.values[0]?.[0]}</dd>
            </div>
          ))}
        </dl>
      </section>
      <footer>
        <p>
          supir-batch {report.version}, built {date(report.built_at, true)}. Full records are in the run log and in the
          .json beside each image. Licenses of what this page is made of: <a href="assets/licenses.txt">licenses.txt</a>
        </p>
      </footer>
    </div>
  );
}
