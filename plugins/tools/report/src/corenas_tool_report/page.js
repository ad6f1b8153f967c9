(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const chosen = {};

  const draw = (plot) => {
    const item = plot.menu[chosen[plot.name] || 0];
    const traces = plot.traces.map((trace, i) => ({ type: "scatter", ...trace, ...(item ? item.changes[i] : {}) }));
    const axis = (given) => ({ ...given, gridcolor: colour("--line"), linecolor: colour("--line"), color: colour("--soft") });
    const layout = {
      ...plot.layout,
      xaxis: axis(plot.layout.xaxis),
      yaxis: axis(plot.layout.yaxis),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
      hoverlabel: { ...plot.layout.hoverlabel, bgcolor: colour("--card"), bordercolor: colour("--soft"), font: { color: colour("--ink"), size: 12 } },
      // A finger scrolls the page; only a mouse draws a box to zoom into.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    };
    if (item) layout.xaxis.title = { ...layout.xaxis.title, text: item.title };
    Plotly.react(plot.name, traces, layout, config);
  };

  const all = () => plots.forEach(draw);
  all();
  dark.addEventListener("change", all);
  document.querySelectorAll("select[data-plot]").forEach((select) => {
    const plot = plots.find((each) => each.name === select.dataset.plot);
    const pick = () => { chosen[plot.name] = Number(select.value); draw(plot); };
    select.addEventListener("change", pick);
    if (select.value !== "0") pick(); // a browser that remembers what was chosen
  });
})();
