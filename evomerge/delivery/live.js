// Of served pages: follows the run. The stream of events names the stamp of the newest page; where it is not this
// page's, the page is fetched, and the parts that differ are put in place. Scroll positions, opened details,
// sorted tables and an open dialog stay.
"use strict";
(() => {
  const address = new URL(location.href);
  if (address.searchParams.has("token")) {
    address.searchParams.delete("token"); // the cookie has it now
    history.replaceState(null, "", address);
  }
  const { events } = document.body.dataset;
  if (!events) return;
  const FOCUS = "a, button, summary, [tabindex]";
  const main = document.querySelector("main");
  const texts = (root) => [...root.children].map((part) => part.outerHTML);
  let stamp = document.body.dataset.stamp;
  let shown = texts(main);
  let busy = false;
  let again = false;

  const say = (text) => {
    const link = document.getElementById("link");
    if (link.textContent !== text) link.textContent = text;
  };
  const name = (part) => part.querySelector("h1, h2")?.textContent ?? part.tagName;
  const state = (part) => {
    const all = (selector) => [...part.querySelectorAll(selector)];
    return {
      scrolls: all(".scroll").map((box) => box.scrollLeft),
      open: all("details[open] > summary").map((line) => line.textContent),
      orders: new Map(all("th[aria-sort]").map((head) => [head.textContent, head.getAttribute("aria-sort")])),
      focus: all(FOCUS).indexOf(document.activeElement),
    };
  };
  const restore = (part, { scrolls, open, orders, focus }) => {
    const all = (selector) => [...part.querySelectorAll(selector)];
    all(".scroll").forEach((box, n) => (box.scrollLeft = scrolls[n] ?? 0));
    for (const line of all("details > summary")) if (open.includes(line.textContent)) line.parentElement.open = true;
    for (const head of all("table.sortable th")) {
      const order = orders.get(head.textContent);
      if (order) head.querySelector("button").click();
      if (order === "ascending") head.querySelector("button").click();
    }
    if (focus >= 0) part.querySelectorAll(FOCUS)[focus]?.focus({ preventScroll: true });
  };
  const replace = (page) => {
    const parts = [...page.querySelector("main").children];
    const old = [...main.children];
    const states = new Map(old.map((part) => [name(part), state(part)]));
    const seen = old.find((part) => part.getBoundingClientRect().bottom > 0);
    const place = seen?.getBoundingClientRect().top;
    const fresh = parts.map((part) => part.outerHTML);
    const kept = parts.map((part, n) => (fresh[n] === shown[n] ? old[n] : document.importNode(part, true)));
    kept.forEach((part, n) => {
      if (part === old[n]) return;
      if (n < main.children.length) main.children[n].replaceWith(part);
      else main.append(part);
      if (states.has(name(part))) restore(part, states.get(name(part)));
    });
    while (main.children.length > kept.length) main.lastElementChild.remove();
    shown = fresh;
    const now = seen && [...main.children].find((part) => name(part) === name(seen));
    if (now) scrollBy(0, now.getBoundingClientRect().top - place);
    const data = page.getElementById("details");
    const last = document.getElementById("details");
    if (last) last.remove();
    if (data) document.body.append(document.importNode(data, true));
    document.getElementById("state").replaceChildren(...document.importNode(page.getElementById("state"), true).childNodes);
    document.title = page.title;
    stamp = page.body.dataset.stamp;
    document.dispatchEvent(new Event("replaced"));
  };
  const refresh = async () => {
    again = busy;
    if (busy) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.ok) replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      else say(await answer.text());
    } catch {
      say("no answer");
    }
    busy = false;
    if (again) refresh(); // an event came meanwhile
  };

  // A browser keeps six connections to one server: only the pages that are seen hold one.
  let stream = null;
  const follow = () => {
    if (document.hidden) {
      stream?.close();
      stream = null;
    } else if (stream === null) {
      stream = new EventSource(events);
      stream.onmessage = (event) => {
        say("");
        if (event.data !== stamp) refresh();
      };
      stream.onerror = () => {
        const closed = stream.readyState === EventSource.CLOSED;
        say(closed ? "The server has ended: open the address that evomerge serve prints." : "no connection, trying again");
      };
    }
  };
  document.addEventListener("visibilitychange", follow);
  follow();
})();
