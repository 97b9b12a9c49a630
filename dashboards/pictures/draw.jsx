// Draws a dashboard by Grafana's component library, from its file and the answers of a Prometheus.
//
// `cargo xtask dashboards --pictures` bundles it, and has a browser call `draw(dashboard, answers)` in index.html, in a window
// of `heightOf(dashboard)` pixels: tables that are out of sight are not drawn. Answers are {from, to, step, interval, series}: seconds since 1970, seconds, seconds, and by each query with its variables what
// the HTTP API returns for a range.
//
// Lines, bars, figures, levels, tables, frames, legends, axes, units and thresholds are the library's own. What Grafana
// keeps elsewhere is drawn here, as near as can be: dials, the cells of heatmaps and states, and marks.

import React from "react";
import { createRoot } from "react-dom/client";
import {
  createTheme, dateTime, FieldType, getDisplayProcessor, getValueFormat, ThemeContext, toDataFrame,
} from "@grafana/data";
import { BarGauge, BigValue, PanelChrome, TimeSeries, VizRepeater } from "@grafana/ui";
import { TableNG } from "@grafana/ui/unstable";

const WIDTH = 1600;
const COLUMN = WIDTH / 24;
// Grafana's: 30 pixels, and 8 between two panels.
const ROW = 38;
const GAP = 8;
const HEAD = 50;
const UTC = "utc";
const theme = createTheme({ colors: { mode: "dark" } });

// What Grafana fills in where a panel says nothing.
const CUSTOM = {
  drawStyle: "line", lineInterpolation: "linear", pointSize: 5, axisPlacement: "auto", axisLabel: "",
  scaleDistribution: { type: "linear" }, hideFrom: { legend: false, tooltip: false, viz: false },
  stacking: { mode: "none", group: "A" }, thresholdsStyle: { mode: "off" }, barAlignment: 0, barWidthFactor: 0.6,
};

const legend = (format, labels) => format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => labels[label] ?? "");

/** A series as a frame of Grafana's, named and coloured as its panel says. */
function frame(panel, target, series, index, answers) {
  const { defaults, overrides } = panel.fieldConfig;
  const name = legend(target.legendFormat, series.metric);
  const colour = overrides.find((override) => override.matcher.options === name)?.properties[0].value;
  const config = {
    ...defaults, displayName: name, color: colour ?? defaults.color, custom: { ...CUSTOM, ...defaults.custom },
    interval: answers.step * 1000,
  };
  const number = ([, text]) => (Number.isFinite(parseFloat(text)) ? parseFloat(text) : null);
  // Bars each count what is between them and the last.
  const apart = panel.interval ? answers.interval : answers.step;
  const samples = series.values.filter(([time]) => Math.round((answers.to - time) / answers.step) % Math.round(apart / answers.step) === 0);
  const made = toDataFrame({
    name, refId: target.refId,
    fields: [
      { name: "Time", type: FieldType.time, values: samples.map(([time]) => time * 1000), config: { interval: apart * 1000 } },
      { name: "Value", type: FieldType.number, labels: series.metric, values: samples.map(number), config },
    ],
  });
  made.fields[1].state = { displayName: name, seriesIndex: index };
  for (const field of made.fields) field.display = getDisplayProcessor({ field, theme, timeZone: UTC });
  return made;
}

/** The answers to a panel's queries; to those for the newest value only the series that have one. */
function frames(panel, answers) {
  const isNow = (series) => answers.to - series.values.at(-1)[0] < answers.step;
  const found = panel.targets.flatMap((target) => {
    const all = answers.series[target.expr] ?? [];
    return all.filter((series) => !target.instant || isNow(series)).map((series) => [target, series]);
  });
  return found.map(([target, series], index) => frame(panel, target, series, index, answers));
}

const newest = (frame) => frame.fields[1].values.findLast((value) => value !== null) ?? null;
const shown = (frame) => ({ ...frame.fields[1].display(newest(frame)), title: frame.name });

/** Draws on the plot of lines, behind its series, when it is drawn. */
function onPlot(builder, draw) {
  builder.addHook("drawAxes", (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    draw(plot, ctx, bbox);
    ctx.restore();
  });
}

/** Marks of what happened, as Grafana draws annotations. */
function marks(plot, ctx, { top, height }, board, answers) {
  for (const annotation of board.annotations.list) {
    for (const series of answers.series[annotation.expr] ?? []) {
      const times = annotation.useValueForTime
        ? series.values.map(([, milliseconds]) => parseFloat(milliseconds))
        : series.values.map(([time]) => time * 1000);
      // One that lasts is marked at its beginning.
      const apart = answers.interval * 1000;
      const begun = [...new Set(times)].filter((time, index, all) => index === 0 || time - all[index - 1] > apart);
      ctx.strokeStyle = theme.visualization.getColorByName(annotation.iconColor);
      ctx.setLineDash([4, 4]);
      for (const time of begun) {
        const x = plot.valToPos(time, "x", true);
        ctx.beginPath();
        ctx.moveTo(x, top);
        ctx.lineTo(x, top + height);
        ctx.stroke();
      }
    }
  }
}

function Lines({ board, panel, answers, range, ...size }) {
  return (
    <TimeSeries {...size} frames={frames(panel, answers)} timeRange={range} timeZone={UTC} legend={panel.options.legend}>
      {(builder) => onPlot(builder, (...plot) => marks(...plot, board, answers))}
    </TimeSeries>
  );
}

function Figure({ panel, answers, ...size }) {
  const [first] = frames(panel, answers);
  const { textMode, colorMode, graphMode, justifyMode } = panel.options;
  const value = textMode === "name" ? { ...shown(first), text: first.name, suffix: "" } : { ...shown(first), title: "" };
  return <BigValue {...size} theme={theme} value={value} colorMode={colorMode} graphMode={graphMode} justifyMode={justifyMode} textMode="value" />;
}

function Levels({ panel, answers, ...size }) {
  const all = frames(panel, answers);
  const max = Math.max(...all.map(newest));
  return (
    <VizRepeater
      {...size} source={all} getValues={() => all} renderCounter={0} orientation="horizontal" itemSpacing={8} minVizHeight={16}
      renderValue={({ value: frame, width, height }) => {
        const field = { ...frame.fields[1].config, min: 0, max };
        return (
          <BarGauge
            width={width} height={height} theme={theme} orientation="horizontal" displayMode={panel.options.displayMode} showUnfilled
            field={field} display={frame.fields[1].display} value={{ ...shown(frame), percent: newest(frame) / max }}
          />
        );
      }}
    />
  );
}

function Rows({ panel, answers, ...size }) {
  const all = frames(panel, answers);
  const { excludeByName: hidden, renameByName: names } = panel.transformations[0].options;
  const labels = Object.keys(all[0].fields[1].labels).filter((label) => label !== "__name__");
  const column = (name, type, values, config) => ({ name, type, values, config: { custom: { align: "auto", cellOptions: { type: "auto" } }, ...config } });
  const { unit, decimals } = panel.fieldConfig.defaults;
  const fields = [
    ...labels.map((label) => column(label, FieldType.string, all.map((frame) => frame.fields[1].labels[label]), {})),
    column("Value", FieldType.number, all.map(newest), { unit, decimals }),
  ];
  const organized = fields.filter(({ name }) => !hidden[name]).map((field) => ({ ...field, name: names[field.name] ?? field.name }));
  const data = toDataFrame({ fields: organized });
  for (const field of data.fields) field.display = getDisplayProcessor({ field, theme, timeZone: UTC });
  return <TableNG {...size} data={data} cellHeight={panel.options.cellHeight} />;
}

/** A share as an arc. */
function Dial({ panel, answers, width, height }) {
  const [first] = frames(panel, answers);
  const { text, suffix, color } = shown(first);
  const radius = Math.min(width / 2, height) - 20;
  const [x, y] = [width / 2, height - 12];
  const arc = (share) => {
    const angle = Math.PI * (1 - Math.min(1, Math.max(0.001, share / panel.fieldConfig.defaults.max)));
    return `M${x - radius},${y}A${radius},${radius} 0 0 1 ${x + radius * Math.cos(angle)},${y - radius * Math.sin(angle)}`;
  };
  return (
    <svg width={width} height={height} fill="none" strokeWidth={16}>
      <path d={arc(1)} stroke={theme.colors.background.secondary} />
      <path d={arc(newest(first))} stroke={color} />
      <text x={x} y={y - 4} textAnchor="middle" fill={color} fontSize={26} fontWeight={500}>{text}{suffix}</text>
    </svg>
  );
}

/** The plot of lines with rows of cells in their place; `rows` are {name, cells: [[milliseconds, colour]]}, from below. */
function Cells({ rows, apart, range, ...size }) {
  const values = range.ticks.map(() => null);
  const frame = toDataFrame({
    fields: [
      { name: "Time", type: FieldType.time, values: range.ticks, config: {} },
      { name: "Value", type: FieldType.number, values, config: { min: 0, max: rows.length, custom: { ...CUSTOM } } },
    ],
  });
  for (const field of frame.fields) field.display = getDisplayProcessor({ field, theme, timeZone: UTC });
  // Names that would lie over each other are left out.
  const every = Math.ceil((rows.length * 16) / size.height);
  const middles = rows.map((_, index) => index + 0.5).filter((_, index) => index % every === 0);
  const axis = (props) => ({ ...props, splits: middles, values: () => middles.map((at) => rows[at - 0.5].name), grid: { show: false }, size: 80 });
  const draw = (plot, ctx) => {
    rows.forEach(({ cells }, index) => {
      const [bottom, top] = [index, index + 1].map((at) => plot.valToPos(at, plot.series[1].scale, true));
      for (const [time, colour] of cells) {
        const [left, right] = [time - apart, time].map((at) => plot.valToPos(at, "x", true));
        ctx.fillStyle = colour;
        ctx.fillRect(left, top + 1, Math.max(1, right - left), bottom - top - 2);
      }
    });
  };
  return (
    <TimeSeries {...size} frames={[frame]} timeRange={range} timeZone={UTC} legend={{ showLegend: false }} tweakAxis={(props, field) => (field.type === FieldType.number ? axis(props) : props)}>
      {(builder) => onPlot(builder, draw)}
    </TimeSeries>
  );
}

function States({ panel, answers, ...rest }) {
  const blue = theme.visualization.getColorByName("blue");
  const rows = frames(panel, answers).map(({ name, fields: [times, values] }) => {
    const cells = times.values.filter((_, index) => values.values[index] === 1).map((time) => [time, blue]);
    return { name, cells };
  });
  return <Cells {...rest} rows={rows.reverse()} apart={answers.step * 1000} />;
}

/** Buckets count what is below their edge, so a cell has what its bucket has more than the one below. */
function Heatmap({ panel, answers, ...rest }) {
  const edge = (frame) => parseFloat(frame.name);
  const buckets = frames(panel, answers).filter((frame) => Number.isFinite(edge(frame))).sort((a, b) => edge(a) - edge(b));
  let below = new Map();
  const counted = buckets.map((frame) => {
    const counts = new Map(frame.fields[0].values.map((time, index) => [time, frame.fields[1].values[index] ?? 0]));
    const own = [...counts].map(([time, count]) => [time, count - (below.get(time) ?? 0)]).filter(([, count]) => count > 1e-9);
    below = counts;
    return { name: formatted(panel.options.yAxis.unit, edge(frame)), own };
  });
  const used = counted.map(({ own }) => own.length > 0);
  const rows = counted.slice(used.indexOf(true), used.lastIndexOf(true) + 1);
  const most = Math.max(...rows.flatMap(({ own }) => own.map(([, count]) => count)));
  // The scheme of oranges, dark for few on the dark theme.
  const colour = (count) => {
    const share = (count / most) ** panel.options.color.exponent;
    return `rgb(${90 + 165 * share},${35 + 165 * share},${10 + 120 * share})`;
  };
  const painted = rows.map(({ name, own }) => ({ name, cells: own.map(([time, count]) => [time, colour(count)]) }));
  return <Cells {...rest} rows={painted} apart={answers.step * 1000} />;
}

function formatted(unit, value) {
  const { text, suffix } = getValueFormat(unit)(value);
  return `${text}${suffix ?? ""}`;
}

const KINDS = {
  timeseries: Lines, stat: Figure, bargauge: Levels, table: Rows, gauge: Dial, "state-timeline": States, heatmap: Heatmap,
};

function Board({ board, answers }) {
  const [from, to] = [answers.from, answers.to].map((seconds) => dateTime(seconds * 1000));
  const range = { from, to, raw: { from, to }, ticks: [answers.from * 1000, answers.to * 1000] };
  const panels = board.panels.map((panel) => {
    const { x, y, w, h } = panel.gridPos;
    const [width, height] = [w * COLUMN - GAP, h * ROW - GAP];
    const place = { position: "absolute", left: x * COLUMN + GAP / 2, top: HEAD + y * ROW, width, height };
    if (panel.type === "row") {
      return <div key={panel.id} style={{ ...place, fontSize: 16, fontWeight: 500, lineHeight: "30px" }}>{panel.title}</div>;
    }
    const Kind = KINDS[panel.type];
    const draw = (innerWidth, innerHeight) =>
      frames(panel, answers).length === 0
        ? <div style={{ textAlign: "center", lineHeight: `${innerHeight}px`, color: theme.colors.text.secondary }}>No data</div>
        : <Kind board={board} panel={panel} answers={answers} range={range} width={innerWidth} height={innerHeight} />;
    return <div key={panel.id} style={place}><PanelChrome title={panel.title} width={width} height={height}>{draw}</PanelChrome></div>;
  });
  return (
    <ThemeContext.Provider value={theme}>
      <div style={{ position: "relative", width: WIDTH, height: heightOf(board) }}>
        <div style={{ padding: "12px 8px", fontSize: 20 }}>{board.title}</div>
        {panels}
      </div>
    </ThemeContext.Provider>
  );
}

// What Grafana's own page brings beside the library: its reset of the browser's styles.
const STYLE = `
  * { box-sizing: border-box }
  body { margin: 0; background: ${theme.colors.background.canvas}; font: 14px ${theme.typography.fontFamily}; color: ${theme.colors.text.primary} }
  button { background: none; border: 0; padding: 0; font: inherit; color: inherit }
  ul { list-style: none; margin: 0; padding: 0 }
  h2, h6 { margin: 0; font-size: 14px; font-weight: 500 }
  .sr-only { position: absolute; clip-path: inset(50%) }
  ::-webkit-scrollbar { display: none }`;

const heightOf = (board) => HEAD + ROW * Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));

window.heightOf = heightOf;
window.draw = (board, answers) => {
  document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  createRoot(document.body.appendChild(document.createElement("div"))).render(<Board board={board} answers={answers} />);
  // Plots and tables are drawn after they are laid out, some step by step: all is there when nothing has changed for a while.
  let quiet;
  const wait = () => {
    clearTimeout(quiet);
    quiet = setTimeout(() => { window.isDrawn = true; }, 1000);
  };
  new MutationObserver(wait).observe(document.body, { subtree: true, childList: true, attributes: true });
  wait();
};
