// Values under the pointer: the charts are complete without. Places are fractions of the picture, as "box" has them.
"use strict";
const { runs, charts } = JSON.parse(document.getElementById("data").textContent);

function place(value, [low, high], isLog) {
  return isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
}

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function closest(places, place) {
  let index = 0;
  for (let i = 1; i < places.length; i++) {
    if (Math.abs(places[i] - place) < Math.abs(places[index] - place)) index = i;
  }
  return index;
}

function add(parent, tag, className, text = "") {
  const element = parent.appendChild(document.createElement(tag));
  element.className = className;
  element.textContent = text;
  return element;
}

function show(picture, { box, x, y, log, curves }, fraction) {
  const overlay = clear(picture);
  const [left, top, right, bottom] = box;
  const step = x[0] + ((fraction - left) / (right - left)) * (x[1] - x[0]);
  const points = curves
    .filter(({ steps, against }) => against || (step >= steps[0] - 1 && step <= steps[steps.length - 1] + 1))
    .map(({ run, steps, values, against }) => {
      const index = against ? closest(against, step) : nearest(steps, step);
      const where = against ? against[index] : steps[index];
      return { run: runs[run], step: steps[index], value: values[index], where, isAgainst: Boolean(against) };
    });
  if (!points.length) return;
  const across = (value) => `${100 * (left + place(value, x, false) * (right - left))}%`;
  const hair = add(overlay, "div", "hair");
  Object.assign(hair.style, { left: across(points[0].where), top: `${100 * top}%`, height: `${100 * (bottom - top)}%` });
  const tip = add(overlay, "div", "tip");
  for (const point of points) {
    const dot = add(overlay, "div", "dot");
    const height = bottom - place(point.value, y, log) * (bottom - top);
    Object.assign(dot.style, { left: across(point.where), top: `${100 * height}%`, background: point.run.color });
    const name = runs.length > 1 ? `${point.run.label}: ` : "";
    const at = point.isAgainst ? `${Number(point.where.toPrecision(4))}, step ${point.step}` : `step ${point.step}`;
    const line = add(tip, "p", "", `${name}${Number(point.value.toPrecision(4))} at ${at}`);
    line.style.borderColor = point.run.color;
  }
}

function clear(picture) {
  picture.querySelector(".overlay")?.remove();
  return add(picture, "div", "overlay");
}

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const picture = figure.querySelector(".picture");
  const follow = (event) => {
    const { left, width } = picture.getBoundingClientRect();
    show(picture, charts[figure.dataset.chart], (event.clientX - left) / width);
  };
  picture.addEventListener("pointermove", follow);
  picture.addEventListener("pointerdown", follow);
  picture.addEventListener("pointerleave", () => clear(picture));
}

window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
