// The classic schema as Grafana's package @grafana/schema has it, put together so that every panel is of the type of its
// plugin: options and field configuration that the plugin does not know are refused.

import type { Dashboard, FieldConfig, Panel, RowPanel, VariableModel } from "@grafana/schema";
import type * as BarGauge from "@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type * as Gauge from "@grafana/schema/dist/esm/raw/composable/gauge/panelcfg/x/GaugePanelCfg_types.gen";
import type * as Heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as Stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as StateTimeline from "@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type * as Table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as TimeSeries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// JSON has the words of an enumeration, not its members.
type Plain<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends (infer Item)[]
      ? Plain<Item>[]
      : T extends object
        ? { [Key in keyof T]: Plain<T[Key]> }
        : T;

type Datasource = { type: "prometheus"; uid: "${datasource}" };

// The package has no type of Prometheus' queries; these are the fields that Grafana's plugin for it documents.
interface Query {
  refId: string;
  datasource: Datasource;
  editorMode: "code";
  expr: string;
  legendFormat: string;
  format: "time_series" | "table" | "heatmap";
  instant: boolean;
  range: boolean;
}

// Grafana fills in what options do not say, so each may be missing; none may be unknown.
interface Of<Type extends string, Options, Custom>
  extends Omit<Plain<Panel>, "type" | "datasource" | "targets" | "options" | "fieldConfig" | "links"> {
  type: Type;
  datasource: Datasource;
  targets: Query[];
  options: Plain<Partial<Options>>;
  fieldConfig: {
    defaults: Omit<Plain<FieldConfig>, "custom"> & { custom: Plain<Partial<Custom>> };
    overrides: {
      matcher: { id: "byName"; options: string };
      properties: { id: "color"; value: Plain<FieldConfig["color"]> }[];
    }[];
  };
  // The package has a dashboard's links only; a panel's have these fields.
  links: { title: string; url: string; targetBlank: boolean }[];
}

type Nothing = Record<string, never>;

type AnyPanel =
  | Of<"timeseries", TimeSeries.Options, TimeSeries.FieldConfig>
  | Of<"stat", Stat.Options, Nothing>
  | Of<"gauge", Gauge.Options, Nothing>
  | Of<"bargauge", BarGauge.Options, Nothing>
  | Of<"heatmap", Heatmap.Options, Heatmap.FieldConfig>
  | Of<"state-timeline", StateTimeline.Options, StateTimeline.FieldConfig>
  | Of<"table", Table.Options, Table.FieldConfig>;

// `definition` is written by Grafana's editor; the package's types leave it out.
type Variable = Omit<Plain<VariableModel>, "current" | "query"> & {
  current: Plain<VariableModel["current"]> | Nothing;
  query: string | { query: string; refId: string };
  definition?: string;
};

// Fields of Prometheus' annotations, which the package's type leaves to the data source.
interface Annotation {
  datasource: Datasource;
  enable: boolean;
  hide: boolean;
  iconColor: string;
  name: string;
  target: { refId: string; expr: string };
  expr: string;
  titleFormat: string;
  textFormat: string;
  tagKeys: string;
  useValueForTime: boolean;
}

export interface Classic
  extends Omit<Plain<Dashboard>, "annotations" | "panels" | "templating" | "uid" | "title"> {
  uid: string;
  title: string;
  annotations: { list: Annotation[] };
  templating: { list: Variable[] };
  panels: (AnyPanel | Plain<RowPanel>)[];
}
