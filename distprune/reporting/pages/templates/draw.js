const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {responsive: true, displayModeBar: false};

function draw(source) {
  const {data, layout} = JSON.parse(source.textContent);
  layout.template = TEMPLATES[dark.matches ? "dark" : "light"];
  Plotly.react(source.previousElementSibling, data, layout, config);
}

const sources = document.querySelectorAll("script.chart");
sources.forEach(draw);
dark.addEventListener("change", () => sources.forEach(draw));
