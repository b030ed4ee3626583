// Feeds the charts of the report with its data, and lets the slider choose a rung of the ladder.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  // the links of the library's menu lead out of the page
  const options = { mode: "vega-lite", renderer: "svg", actions: false };
  const percent = (share) => `${Math.round(100 * share)}%`;
  const slider = element("budget");
  const measures = element("measure");
  let tradeOff = null;
  let widths = null;

  const rung = () => data.ladder.rungs[slider.valueAsNumber];
  const chosen = () => (slider ? [rung()] : []);

  function blocks({ choices }) {
    return data.blocks.map(({ layer, kind, widths: all }, index) => {
      const width = all[choices[index]];
      const share = width / all.at(-1);
      const about = width ? `${width} of ${all.at(-1)} (${percent(share)})` : "skipped";
      return { layer, kind: kind === "mlp" ? "MLP" : kind, share, about };
    });
  }

  const measure = () => data.measures[measures ? measures.selectedIndex : 0] ?? { points: [], is_loss: true };
  const chosenHere = () => (measure().is_loss ? chosen() : []);

  async function drawTradeOff() {
    tradeOff?.finalize();
    element("ladder")?.toggleAttribute("hidden", !measure().is_loss);
    const cost = document.querySelector("input[name=cost]:checked").value;
    const { points, title = "loss (nats per token)", is_loss } = measure();
    const known = points.filter(({ costs }) => cost in costs);
    const datasets = {
      points: known,
      intervals: known.filter(({ low }) => low !== null),
      rungs: (is_loss && data.ladder?.rungs) || [],
      chosen: chosenHere(),
    };
    const spec = { ...structuredClone(data.charts.trade_off[cost]), datasets };
    // a scale of nothing has no extent
    spec.layer = spec.layer.filter((layer) => datasets[layer.data.name].length);
    for (const { encoding } of spec.layer) {
      encoding.y.title = title;
    }
    tradeOff = await vegaEmbed("#trade-off", spec, options);
    const hidden = points.filter((point) => !known.includes(point)).map(({ name }) => name);
    element("hidden").textContent = hidden.length
      ? `Not on this axis, as nothing says what they cost here: ${hidden.join(", ")}.`
      : "";
  }

  function say({ ratio, loss, shown, ratios, choices }) {
    const rows = [["budget", ratio.toFixed(3)], [`loss, ${data.ladder.losses}`, `${loss.toFixed(3)} nats per token`]];
    for (const [name, cost] of Object.entries(shown)) {
      rows.push([data.nouns[name], `${cost} (${percent(ratios[name])})`]);
    }
    for (const kind of ["attention", "MLP"]) {
      const shares = blocks({ choices }).filter((block) => block.kind === kind).map(({ share }) => share);
      const skipped = shares.filter((share) => share === 0).length;
      const mean = percent(shares.reduce((sum, share) => sum + share, 0) / shares.length);
      rows.push([`${kind} width`, skipped ? `${mean}, ${skipped} of ${shares.length} skipped` : mean]);
    }
    element("chosen").replaceChildren(
      ...rows.flatMap(([name, value]) => {
        const [term, description] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = name;
        description.textContent = value;
        return [term, description];
      }),
    );
    slider.setAttribute("aria-valuetext", `${ratio.toFixed(3)}, loss ${loss.toFixed(3)}`);
  }

  // one after the other, however fast they are asked for
  let drawing = Promise.resolve();
  function draw() {
    drawing = drawing.then(drawTradeOff);
    return drawing;
  }

  async function move() {
    say(rung());
    await drawing;
    await Promise.all([
      measure().is_loss && tradeOff.view.data("chosen", chosen()).runAsync(),
      widths.view.data("widths", blocks(rung())).runAsync(),
    ]);
  }

  // a page in a frame has no height of its own
  function fit(frame) {
    frame.style.height = `${frame.contentDocument.documentElement.scrollHeight + 2}px`;
  }

  async function start() {
    const axes = document.querySelectorAll("input[name=cost]");
    for (const input of axes) {
      input.addEventListener("change", draw);
    }
    measures?.addEventListener("change", draw);
    await draw();
    if (slider) {
      widths = await vegaEmbed("#widths", { ...data.charts.widths, datasets: { widths: blocks(rung()) } }, options);
      say(rung());
      slider.addEventListener("input", move);
    }
    const frame = element("compute");
    frame?.closest("details").addEventListener("toggle", () => fit(frame));
    document.documentElement.dataset.drawn = "true";
  }
  start();
})();
