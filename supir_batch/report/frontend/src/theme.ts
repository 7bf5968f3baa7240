/** Light or dark: as the system says, until somebody chooses. */

const KEY = "supir-batch/theme";

export type Theme = "light" | "dark";

export function theme(): Theme {
  return document.documentElement.dataset.theme as Theme;
}

export function applyTheme(chosen?: Theme): void {
  try {
    if (chosen) localStorage.setItem(KEY, chosen);
    chosen ??= (localStorage.getItem(KEY) as Theme | null) ?? undefined;
  } catch {
    // a browser that keeps nothing follows the system
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
  dispatchEvent(new Event("theme"));
  if (!chosen) dark.addEventListener("change", () => applyTheme(), { once: true });
}
