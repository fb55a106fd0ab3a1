// Frame around the views: title, tabs and theme. Starts the page.

const THEMES = ['auto', 'light', 'dark'];

function remembered() {
  try {
    const theme = localStorage.getItem('animesion-theme');
    return THEMES.includes(theme) ? theme : 'auto';
  } catch {
    return 'auto';
  }
}

function Theme() {
  const [theme, set] = useState(remembered());
  useLayoutEffect(() => {
    document.documentElement.dataset.theme = theme;
    dispatchEvent(new Event('theme'));
    try {
      localStorage.setItem('animesion-theme', theme);
    } catch {
      // a page opened from disk may have no storage
    }
  }, [theme]);
  return html`<button class="theme" onClick=${() => set(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length])} title="Light, dark or the system's theme">Theme: ${theme}</button>`;
}

function App({ data }) {
  const [at, query] = useRoute();
  const [tabsOf, View] = { run: [runTabs, Run], explain: [explainTabs, Explain] }[data.kind] || [datasetTabs, Dataset];
  const tabs = tabsOf(data);
  const now = tabs.some(([name]) => name === at[0]) ? at[0] : (tabs[0] || ['overview'])[0];
  return html`<header>
      <div class="title"><h1><${Name} text=${data.title} /></h1><${Theme} /></div>
      <nav class="tabs" aria-label="Views">${tabs.map(([name, text]) => html`<a href=${href(name)} aria-current=${name === now ? 'page' : undefined}>${text}</a>`)}</nav>
    </header>
    <main tabindex="-1"><${View} data=${data} at=${[now, ...at.slice(1)]} query=${now === at[0] ? query : ''} /></main>`;
}

const data = JSON.parse(document.getElementById('data').textContent);
if (data.live) data.token = writeToken();
document.documentElement.dataset.theme = remembered();
const root = document.getElementById('app');
root.textContent = '';
preact.render(html`<${App} data=${data} />`, root);
