// Puts a chart that moves in the place of each still picture of one; pages without any load nothing more.
{
  const figures = document.querySelectorAll(".moving-figure");
  const draw = async (figure) => {
    const specification = JSON.parse(figure.querySelector("script").textContent);
    const options = { actions: false, renderer: "svg", bind: figure.querySelector(".sliders") };
    await vegaEmbed(figure.querySelector(".chart"), specification, options);
    figure.classList.add("moves");
  };
  if (figures.length) {
    const vega = document.createElement("script");
    vega.src = new URL("vega.js", document.currentScript.src);
    vega.onload = () => figures.forEach(draw);
    document.head.append(vega);
  }
}
