import { useEffect, useRef, useState } from "preact/hooks";

const KEY = "supir-batch/shortcuts";

/** Whether single keys do something; some people's input devices press keys by accident. */
export function shortcutsOn(): boolean {
  try {
    return localStorage.getItem(KEY) !== "off";
  } catch {
    return true;
  }
}

const KEYS: [string, string][] = [
  ["j", "next image"],
  ["k", "previous image"],
  ["a", "accept"],
  ["r", "reject"],
  ["d", "redo with other settings"],
  ["u", "take the decision back"],
  ["n", "write a note"],
  ["s", "slider"],
  ["t", "side by side"],
  ["b", "hold: the image before restoration"],
  ["f", "fit into the window"],
  ["1", "one pixel on one pixel"],
  ["+ −", "zoom"],
  ["Esc", "leave a field; back to the images"],
  ["?", "this help"],
];

export function Help({ close }: { close: () => void }) {
  const box = useRef<HTMLDialogElement>(null);
  const [on, setOn] = useState(shortcutsOn);
  useEffect(() => box.current?.showModal(), []);
  return (
    <dialog ref={box} onClose={close} aria-labelledby="help">
      <h2 id="help">Keyboard</h2>
      <dl class="keys">
        {KEYS.map(([key, what]) => (
          <div key={key}>
            <dt>
              <kbd>{key}</kbd>
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
      <label class="check">
        <input
          type="checkbox"
          checked={on}
          onChange={(event) => {
            setOn(event.currentTarget.checked);
            try {
              localStorage.setItem(KEY, event.currentTarget.checked ? "on" : "off");
            } catch {
              // then it holds for this page only
            }
          }}
        />
        Single keys do this
      </label>
      <p>
        Decisions stay in this browser until you export them; where <code>supir-batch serve</code> shows this report, they
        are saved with the output at once.
      </p>
      <form method="dialog">
        <button type="submit">Close</button>
      </form>
    </dialog>
  );
}
