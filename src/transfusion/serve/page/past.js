// What was asked, kept in this browser alone, with all that makes it again.

import { $, element } from "./dom.js";

const KEY = "transfusion-history";
const KEPT = 60;
// Letters of a request that is kept. Large images of a prompt would fill what a browser gives a page.
const MOST_LETTERS = 200_000;

export class Past {
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.entries = read();
    $("clear-history").addEventListener("click", () => {
      this.entries = [];
      this.keep();
    });
    this.show();
  }

  add(entry) {
    this.entries.unshift(entry);
    this.entries.length = Math.min(this.entries.length, KEPT);
    this.keep();
  }

  keep() {
    const kept = this.entries.filter((entry) => JSON.stringify(entry.body).length < MOST_LETTERS);
    for (;;) {
      try {
        localStorage.setItem(KEY, JSON.stringify(kept));
        break;
      } catch {
        // Full, or not allowed.
        if (!kept.pop()) break;
      }
    }
    this.show();
  }

  show() {
    $("no-past").hidden = this.entries.length > 0;
    $("clear-history").hidden = this.entries.length === 0;
    $("past").replaceChildren(
      ...this.entries.map((entry) => {
        const picture = entry.thumbnail ? [element("img", { src: entry.thumbnail, alt: "", class: "pixels" })] : [];
        const text = element("span", {}, entry.title, element("small", {}, when(entry.when)));
        const button = element("button", { type: "button", onclick: () => this.onChoose(entry) }, ...picture, text);
        return element("li", {}, button);
      }),
    );
  }
}

// The time of today's, the day of others.
function when(milliseconds) {
  const then = new Date(milliseconds);
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? then.toLocaleTimeString([], { timeStyle: "short" }) : then.toLocaleDateString([], { dateStyle: "medium" });
}

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((entry) => entry?.body?.prompt !== undefined) : [];
  } catch {
    return [];
  }
}
