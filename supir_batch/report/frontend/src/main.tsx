import "./style.css";

import { render } from "preact";
import { App } from "./app";
import { listen } from "./data";
import { Decisions } from "./decisions";
import { applyTheme } from "./theme";

applyTheme();
const page = document.getElementById("page")!;
let started = false;

listen((report) => {
  started = true;
  document.title = `${report.name}: restoration report`;
  page.textContent = "";
  render(<App report={report} decisions={new Decisions(report)} />, page);
});

addEventListener("load", () => {
  if (!started) page.textContent = "The report's data (data/report.js) is missing or damaged; build the report again.";
});
