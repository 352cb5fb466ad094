"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // Text is only added as text nodes, so that model output is never parsed as markup.
  function el(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    for (const child of children) if (child !== null && child !== undefined) node.append(child);
    return node;
  }

  const MINUS = "\u2212";
  const fixed = (value, digits) => value.toFixed(digits).replace("-", MINUS);
  const signed = (value) => Math.abs(value) < 0.005 ? "0.00" : (value > 0 ? "+" : "") + fixed(value, 2);
  const short = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("-", MINUS);
    return (size >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(4)))).replace("-", MINUS);
  };

  // ---- values under the pointer

  function nearest(steps, target) {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < target) low = middle; else high = middle;
    }
    return target - steps[low] <= steps[high] - target ? low : high;
  }

  for (const figure of document.querySelectorAll(".chart")) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const area = figure.querySelector(".area");
    const cursor = el("div", "cursor"), tip = el("div", "tip");
    const leave = () => { cursor.remove(); tip.remove(); };
    area.addEventListener("pointerleave", leave);
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const pointed = chart.low + (chart.high - chart.low) * (event.clientX - box.left) / box.width;
      const hits = chart.series.map((series) => ({ series, at: nearest(series.steps, pointed) }));
      const steps = hits.map(({ series, at }) => series.steps[at]);
      const step = steps.reduce((a, b) => Math.abs(b - pointed) < Math.abs(a - pointed) ? b : a);
      const share = (step - chart.low) / (chart.high - chart.low);
      tip.replaceChildren(el("div", "", `step ${step}`), ...hits
        .filter(({ series, at }) => Math.abs(series.steps[at] - step) <= (chart.high - chart.low) / 20)
        .map(({ series, at }) => el("div", "", el("span", "", el("i", `c${series.colour}`), series.name),
          el("b", "", short(series.values[at])))));
      cursor.style.left = `${100 * share}%`;
      area.append(cursor, tip);
      const free = box.width - tip.offsetWidth;
      const left = share * box.width + (share < .5 ? 10 : -10 - tip.offsetWidth);
      tip.style.left = `${Math.max(0, Math.min(free, left))}px`;
    });
  }

  // ---- rollouts

  const root = document.getElementById("browser");
  if (!data.groups.length) return;
  root.hidden = false;

  const pages = new Map();
  for (const group of data.groups) {
    const key = `${group.step} ${group.split}`;
    if (!pages.has(key)) pages.set(key, []);
    pages.get(key).push(group);
  }
  const keys = [...pages.keys()];
  const lastTrained = keys.findLastIndex((key) => key.endsWith(" train"));
  const selected = { page: lastTrained < 0 ? keys.length - 1 : lastTrained, group: 0, rollout: 0 };

  const steps = el("select"), groups = el("select");
  const back = el("button", "", "\u2190"), next = el("button", "", "\u2192");
  back.setAttribute("aria-label", "previous step");
  next.setAttribute("aria-label", "next step");
  keys.forEach((key) => {
    const [step, split] = key.split(" ");
    steps.append(el("option", "", split === "train" ? step : `${step} (${split})`));
  });
  const body = el("div");
  root.append(el("div", "bar", el("label", "", "Step", steps), el("span", "", back, " ", next),
    el("label", "", "Question", groups)), body);

  const statusText = (rollout) => rollout.status.replaceAll("_", " ") + (rollout.masked ? " (masked)" : "");
  const hasAdvantage = (group) => group.rollouts.some((rollout) => rollout.turns.some((turn) => turn.advantage));
  // show first a group that gives a gradient
  const firstGroup = (key) => Math.max(0, pages.get(key).findIndex(hasAdvantage));
  selected.group = firstGroup(keys[selected.page]);

  function advantage(value, largest) {
    if (value === null) return el("span", "adv zero", "no advantage");
    const node = el("span", "adv", signed(value));
    const strength = largest ? Math.min(1, Math.abs(value) / largest) : 0;
    const colour = value > 0 ? "--pos" : "--neg";
    node.style.background = value === 0 ? "transparent" : `rgba(var(${colour}), ${.1 + .45 * strength})`;
    return node;
  }

  function parts(entries) {
    const list = el("ul", "parts");
    for (const [name, value] of entries) {
      if (value === null) continue;
      list.append(el("li", value === 0 ? "zero" : "", `${name} `, el("b", "", fixed(value, 2))));
    }
    return list.children.length ? list : null;
  }

  function turnView(turn, index, largest) {
    const calls = turn.tool_calls ? `${turn.tool_successes} of ${turn.tool_calls} tool calls succeeded` : null;
    const finish = turn.finish === "length" ? el("span", "failed", "cut at the token limit") : null;
    const head = el("header", "", el("b", "", `Turn ${index + 1}`), el("span", "", turn.tokens === 1 ? "1 token" : `${turn.tokens} tokens`),
      calls && el("span", "", calls), finish);
    const chip = advantage(turn.advantage, largest);
    chip.title = "advantage of this turn";
    head.append(chip);
    const named = Object.entries(turn.reward_parts);
    const rewards = parts(named.length || turn.reward === null ? named : [["turn reward", turn.reward]]);
    const sampled = el("pre", "sampled", turn.text || " ");
    sampled.dir = "auto";
    const view = el("article", "turn", head, sampled, rewards);
    if (turn.reply) {
      const reply = el("pre", "reply", turn.reply);
      reply.dir = "auto";
      view.append(el("span", "speaker", "environment"), reply);
    }
    return view;
  }

  function rolloutView(rollout, largest) {
    const view = el("div");
    rollout.turns.forEach((turn, index) => view.append(turnView(turn, index, largest)));
    const outcome = el("div", "outcome",
      el("span", rollout.failed ? "failed" : "", statusText(rollout)),
      rollout.outcome === null ? null : ` \u00b7 outcome ${fixed(rollout.outcome, 2)}`,
      rollout.error ? el("pre", "reply", rollout.error) : null,
      parts(Object.entries(rollout.outcome_parts)),
      parts(Object.entries(rollout.metrics).filter(([name]) => !(name in rollout.outcome_parts))));
    view.append(outcome);
    return view;
  }

  function show() {
    const page = pages.get(keys[selected.page]);
    selected.group = Math.min(selected.group, page.length - 1);
    const group = page[selected.group];
    selected.rollout = Math.min(selected.rollout, Math.max(0, group.rollouts.length - 1));
    steps.selectedIndex = selected.page;
    back.disabled = selected.page === 0;
    next.disabled = selected.page === keys.length - 1;
    groups.replaceChildren(...page.map((other, index) =>
      el("option", "", `${index + 1}. ${other.question.slice(0, 90) || "(no question)"}`)));
    groups.selectedIndex = selected.group;

    const turns = group.rollouts.flatMap((rollout) => rollout.turns);
    const largest = Math.max(0, ...turns.map((turn) => Math.abs(turn.advantage ?? 0)));
    const list = el("div", "list");
    group.rollouts.forEach((rollout, index) => {
      const button = el("button", "", el("span", "n", String(index + 1)),
        el("span", rollout.failed ? "state failed" : "state", statusText(rollout)),
        el("span", "", rollout.outcome === null ? "" : fixed(rollout.outcome, 2)));
      const cells = el("span", "cells");
      rollout.turns.forEach((turn) => { if (turn.advantage !== null) cells.append(advantage(turn.advantage, largest)); });
      if (cells.children.length) button.append(cells);
      button.type = "button";
      button.setAttribute("aria-pressed", String(index === selected.rollout));
      button.addEventListener("click", () => { selected.rollout = index; show(); });
      list.append(button);
    });
    const question = el("p", "question", group.question);
    question.dir = "auto";
    const answers = group.answers.slice(0, 20).join(" \u00b7 ");
    const accepted = answers ? `accepted answers: ${answers}` : "";
    const rollout = group.rollouts[selected.rollout];
    const note = group.rule && !hasAdvantage(group) ? "All advantages are 0: this group gives no gradient." : "";
    body.replaceChildren(question, el("p", "answers", accepted), note ? el("p", "answers", note) : "",
      el("div", "split", list, rollout ? rolloutView(rollout, largest) : el("p", "empty", "no rollouts")));
    try { history.replaceState(null, "", `#${selected.page}.${selected.group}.${selected.rollout}`); } catch { /* browsers may refuse it for file: pages */ }
  }

  const showPage = (page) => { selected.page = page; selected.group = firstGroup(keys[page]); show(); };
  back.addEventListener("click", () => showPage(selected.page - 1));
  next.addEventListener("click", () => showPage(selected.page + 1));
  steps.addEventListener("change", () => showPage(steps.selectedIndex));
  groups.addEventListener("change", () => { selected.group = groups.selectedIndex; selected.rollout = 0; show(); });

  const place = /^#(\d+)\.(\d+)\.(\d+)$/.exec(location.hash);
  if (place && Number(place[1]) < keys.length) {
    [selected.page, selected.group, selected.rollout] = place.slice(1).map(Number);
  }
  show();
})();
