// What style sheets cannot do for the pages.

// Charts that move, each in the place of its still picture. Vega is loaded by pages that have one.
{
  const figures = document.querySelectorAll(".moving-figure");
  const draw = async (figure) => {
    const specification = JSON.parse(figure.querySelector("script").textContent);
    const options = { actions: false, renderer: "svg", bind: figure.querySelector(".sliders") };
    await vegaEmbed(figure.querySelector(".chart"), specification, options);
    const empty = figure.querySelectorAll('.chart g[role="graphics-symbol"]:empty');
    empty.forEach((group) => group.removeAttribute("role")); // marks that are not there have no name to be read
    figure.classList.add("moves");
  };
  if (figures.length) {
    const vega = document.createElement("script");
    vega.src = new URL("vega.js", document.currentScript.src);
    vega.onload = () => figures.forEach(draw);
    document.head.append(vega);
  }
}

// Formulas that scroll can be reached by keyboard.
addEventListener("load", async () => {
  await window.MathJax?.startup.promise;
  for (const box of document.querySelectorAll("div.math, div.math mjx-container"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
});

// The list of references is made of entries that are no list items, so it is none for screen readers.
document.querySelector(".citation-list")?.removeAttribute("role");
