import { type CSSVariablesResolver, createTheme, type MantineColorsTuple, Menu, Modal } from "@mantine/core";
import { returnFocus } from "./components/focus-return";

const portal: MantineColorsTuple = [
  "#e5faf6",
  "#d3f0ea",
  "#a8dfd4",
  "#79cdbd",
  "#53beab",
  "#3bb49f",
  "#2aa893",
  "#0d8573",
  "#0a7566",
  "#056356",
];

export const theme = createTheme({
  colors: { portal },
  primaryColor: "portal",
  primaryShade: 8,
  autoContrast: true,
  respectReducedMotion: true,
  defaultRadius: "md",
  cursorType: "pointer",
  fontFamily: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif",
  fontFamilyMonospace: "ui-monospace, 'Cascadia Code', 'SF Mono', Menlo, Consolas, monospace",
  components: {
    // Without it the menu's first element is one that assistive technology cannot place.
    Menu: Menu.extend({ defaultProps: { withInitialFocusPlaceholder: false } }),
    Modal: Modal.extend({
      defaultProps: { closeButtonProps: { "aria-label": "Close" }, onExitTransitionEnd: returnFocus },
    }),
  },
  headings: { fontWeight: "650" },
});

/** Quiet text that still has 4.5:1 against the page, which Mantine's own has not. */
export const variables: CSSVariablesResolver = () => ({
  variables: {},
  light: { "--mantine-color-dimmed": "#5c636a", "--mantine-color-placeholder": "#6c757d" },
  dark: { "--mantine-color-dimmed": "#a6a6a6", "--mantine-color-placeholder": "#9a9a9a" },
});
